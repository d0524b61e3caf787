"""The keys of a pipeline's [data] table: where examples come from, how they are encoded and which are kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
from attrs import evolve, field, frozen, validators

from corefit.data.buckets import Aspect
from corefit.data.filter import Filter
from corefit.data.order import Order
from corefit.errors import counted
from corefit.types import ROUNDING, Example, ModelPath, Reward, Source, Weighted

MAX_LENGTH = 1 << 16
"""The largest height or width in pixels, and the largest number of frames; no image format allows more."""


def check_size(_: object, attribute: attrs.Attribute[Any], value: Sequence[int]) -> None:
    """Raise ValueError unless `value` is a size of pictures or clips."""
    if len(value) not in (2, 3) or min(value) < 1 or max(value) > MAX_LENGTH:
        raise ValueError(
            f"{attribute.name} is {list(value)}, expected [height, width] in pixels, "
            f"or [frames, height, width] for clips, each at most {MAX_LENGTH}"
        )


def _parses(parse: Callable[[str], object]) -> Any:
    """Return a validator that runs `parse` on a string, or on each of several, and names the key in its ValueError."""

    def check(_: object, attribute: attrs.Attribute[Any], value: str | Sequence[str]) -> None:
        for text in [value] if isinstance(value, str) else value:
            try:
                parse(text)
            except ValueError as error:
                raise ValueError(f"{attribute.name}: {error}") from None

    return check


def _check_trigger(_: object, attribute: attrs.Attribute[Any], value: str | None) -> None:
    if value is not None and value.split() != re.split(" ", value):
        raise ValueError(
            f'{attribute.name!r} must be a word, or words with single spaces between them, such as "ohwx", not '
            f"{value!r}"
        )


def _before(trigger: str, caption: str) -> str:
    return f"{trigger}, {caption.strip()}" if caption.strip() else trigger


@frozen
class Data:
    """The data that stages train on: its raw examples, and how they are encoded once into a cache."""

    source: Source | None = None
    """The source that prompts and media are read from."""
    encoded: ModelPath | None = None
    """A cache that was encoded before, instead of `source`: a folder, or a URL such as s3://bucket/cache/0123456789abcdef."""
    trigger: str | None = field(default=None, validator=_check_trigger)
    """A word, such as "ohwx", or a few that stand for what is learned: put before each caption that lacks them, and the
    prompt of media without a caption. Prompts of [eval] are used as they are written."""
    size: tuple[int, ...] = field(default=(512, 512), validator=check_size)
    """[height, width] in pixels, or [frames, height, width] for clips; media are resized and center-cropped to it."""
    aspects: tuple[str, ...] = field(default=(), validator=_parses(Aspect.parse))
    """Aspect ratios, width:height, such as ["1:1", "4:3"]: buckets of the area of `size`; media go to the nearest."""
    fps: float | None = field(default=None, validator=validators.optional(validators.gt(0)))
    """The frames per second at which clips are sampled; by default each clip keeps its own frame rate."""
    score: tuple[Weighted[Reward], ...] = ()
    """Rewards that score the media once, during encoding; each score becomes metadata under the reward's name."""
    keep: str | None = field(default=None, validator=validators.optional(_parses(Filter.parse)))
    """A filter over metadata, such as "aesthetic >= 6.8", for what is trained on; changing it encodes nothing again."""
    skip: int = field(default=0, validator=validators.ge(0))
    """How many missing or unreadable media may be left out (they are counted); with more, the run stops."""
    order: Order = "epochs"
    """epochs: a new permutation of all examples each epoch; independent: each step draws new prompts (Flow-GRPO)."""
    encode_batch: int = field(default=16, validator=[validators.ge(1), validators.le(10_000)], metadata=ROUNDING)
    """How many prompts or media the text encoders or the VAE encode at once."""

    def __attrs_post_init__(self) -> None:
        if (self.source is None) == (self.encoded is None):
            raise ValueError(
                "set exactly one of 'source' (raw examples) and 'encoded' (a cache that was encoded before)"
            )
        for key in ("skip", "score", "fps", "trigger"):
            if self.encoded is not None and getattr(self, key):
                raise ValueError(
                    f"{key!r} applies to raw examples, and those of 'encoded' are encoded already; remove it"
                )
        if self.fps is not None and len(self.size) == 2:
            raise ValueError("'fps' applies to clips, and size = [height, width] is for pictures; remove it")

    @property
    def raw_source(self) -> Source:
        """The source of raw examples; it is an error to ask for it where `encoded` is set.

        A source with a key `class_prompt`, the prompt of media without a caption, gets the trigger as its default.
        """
        assert self.source is not None, "data that were encoded before have no source"
        if self.trigger is not None and getattr(self.source, "class_prompt", "") is None:
            return evolve(self.source, class_prompt=self.trigger)  # pyright: ignore[reportArgumentType]
        return self.source

    def triggered(self, example: Example) -> Example:
        """Return an example with the trigger before each caption that lacks it; the example itself without a trigger.

        A caption has the trigger if it occurs in it as written, and not as a part of a longer word.
        """
        if self.trigger is None:
            return example
        found = re.compile(rf"(?<!\w){re.escape(self.trigger)}(?!\w)")
        texts = [text if found.search(text) else _before(self.trigger, text) for text in example.prompts]
        return evolve(example, prompt=texts[0] if isinstance(example.prompt, str) else tuple(texts))

    @property
    def left_out(self) -> str:
        """What the source left out when it was last read, such as "12 tied pairs left out"; "" for nothing."""
        counts: Mapping[str, int] = getattr(self.source, "left_out", {})
        found = ", ".join(counted(count, what) for what, count in counts.items() if count)
        return f"{found} left out" if found else ""

    @property
    def filter(self) -> Filter | None:
        """The filter that `keep` describes, if it is set."""
        return None if self.keep is None else Filter.parse(self.keep)
