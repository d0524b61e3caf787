"""What a pipeline says of its training data: where examples come from, and how they are encoded and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
from attrs import field, frozen, validators

from corefit.data.buckets import Aspect
from corefit.data.filter import Keep
from corefit.data.order import Order
from corefit.types import ROUNDING, ModelPath, Reward, Source, Weighted

LARGEST = 1 << 16
"""Pixels a side, and frames: no format of pictures has more."""


def _positive(_: object, attribute: attrs.Attribute[Any], value: Sequence[int]) -> None:
    if len(value) not in (2, 3) or min(value) < 1 or max(value) > LARGEST:
        raise ValueError(
            f"{attribute.name} is {list(value)}, expected [height, width] in pixels, "
            f"or [frames, height, width] for clips, each at most {LARGEST}"
        )


def _parsed(parse: Callable[[str], object]) -> Any:
    """A validator of text, or of each of several: what `parse` finds wrong, with the key's name."""

    def check(_: object, attribute: attrs.Attribute[Any], value: str | Sequence[str]) -> None:
        for text in [value] if isinstance(value, str) else value:
            try:
                parse(text)
            except ValueError as error:
                raise ValueError(f"{attribute.name}: {error}") from None

    return check


@frozen
class Data:
    """What stages train on: raw examples, and how they are encoded, once, into a cache."""

    source: Source | None = None
    """Where prompts and media come from."""
    encoded: ModelPath | None = None
    """In place of a source: what was encoded before, a folder or a URL such as s3://bucket/cache/0123456789abcdef."""
    size: tuple[int, ...] = field(default=(512, 512), validator=_positive)
    """Height and width in pixels; of clips frames before them. The shortest side is resized, the centre kept."""
    aspects: tuple[str, ...] = field(default=(), validator=_parsed(Aspect.of))
    """Such as ["1:1", "4:3", "3:4"], width to height: each picture goes to the nearest, at the area of `size`."""
    fps: float | None = field(default=None, validator=validators.optional(validators.gt(0)))
    """Frames a second of clips; each clip's own rate by default."""
    score: tuple[Weighted[Reward], ...] = ()
    """Rewards that judge the media once, when they are encoded; each score is metadata under the reward's name."""
    keep: str | None = field(default=None, validator=validators.optional(_parsed(Keep.of)))
    """Train on examples of which this is true, such as "aesthetic >= 6.8"; it costs no encoding to change."""
    skip: int = field(default=0, validator=validators.ge(0))
    """Missing or unreadable media that may be left out (and are counted) before a run stops."""
    order: Order = "epochs"
    """epochs: every example once, shuffled, then again; independent: each step draws prompts anew (Flow-GRPO)."""
    encode_batch: int = field(default=16, validator=[validators.ge(1), validators.le(10_000)], metadata=ROUNDING)
    """Prompts or pictures that the text encoders or the VAE see at once."""

    def __attrs_post_init__(self) -> None:
        if (self.source is None) == (self.encoded is None):
            raise ValueError("one of 'source' and 'encoded' says where examples come from: give one of the two")
        for key in ("skip", "score", "fps"):
            if self.encoded is not None and getattr(self, key):
                raise ValueError(f"{key!r} is of a source: what is encoded has been read before; remove it")
        if self.fps is not None and len(self.size) == 2:
            raise ValueError("'fps' is of clips, and size = [height, width] is of pictures; remove it")

    @property
    def raw(self) -> Source:
        """The source, where there is one."""
        assert self.source is not None, "what is encoded before has no source"
        return self.source

    @property
    def condition(self) -> Keep | None:
        """`keep`, understood."""
        return None if self.keep is None else Keep.of(self.keep)
