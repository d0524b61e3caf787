"""Raw examples -> rows of a cache: pictures are read, text encoders and VAE are asked once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from attrs import define, field

from corefit.data import COND, X0, Data, Spec, pack
from corefit.errors import DataError
from corefit.mds import Row
from corefit.sources import listed, picture

if TYPE_CHECKING:
    from torch import Tensor

    from corefit.sources import Pixels
    from corefit.types import Backbone, Example

    Read = Sequence[tuple[Example, Pixels | None]]

REMEMBERED = 256
"""Encoded prompts that are kept for those that come again."""

NO_LATENTS: Row = {}

T = TypeVar("T")


@define
class Encoder:
    """Turns examples into rows of the cache, and keeps account of what it could not read."""

    data: Data
    backbone: Backbone
    media: bool
    shape: tuple[int, ...]
    failed: list[str] = field(factory=list[str])
    cond: dict[str, Spec] = field(factory=dict[str, Spec])
    texts: dict[str, Row] = field(factory=dict[str, Row])
    seen: int = 0
    count: int = 0
    enlarged: int = 0

    def rows(self, progress: Callable[[int], None]) -> Iterator[Row]:
        """Past the budget the rest is still opened, so that all unreadable media are listed, but not encoded."""
        for window in _chunks(self.data.raw.examples(), 4 * self.data.encode_batch):
            read = self._read(window)
            if len(self.failed) <= self.data.skip:
                yield from self._encoded(read)
            self.seen += len(window)
            progress(self.seen)

    def _read(self, examples: Sequence[Example]) -> Read:
        if not self.media:
            return [(example, None) for example in examples]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            tried = list(pool.map(_try, examples, repeat(self.data.size)))
        self.failed += [reason for reason, _, _ in tried if reason]
        self.enlarged += sum(enlarged for _, _, enlarged in tried)
        return [(example, image) for example, (_, image, _) in zip(examples, tried, strict=True) if image is not None]

    def _encoded(self, read: Read) -> Iterator[Row]:
        texts = self._texts([example.prompt for example, _ in read])
        for part in _chunks(zip(read, texts, strict=True), self.data.encode_batch):
            latents = self._latents([pair for pair, _ in part]) if self.media else repeat(NO_LATENTS)
            for ((example, _), text), x0 in zip(part, latents, strict=False):
                yield {"prompt": example.prompt, "meta": dict(example.meta), **text, **x0}
        self.count += len(read)

    def _texts(self, prompts: Sequence[str]) -> list[Row]:
        """One row a prompt; prompts that occur again are not encoded again while they are remembered."""
        for part in _chunks((p for p in dict.fromkeys(prompts) if p not in self.texts), self.data.encode_batch):
            self.texts.update(zip(part, self._conditions(part), strict=True))
        rows = [self.texts[prompt] for prompt in prompts]
        for prompt in list(self.texts)[:-REMEMBERED]:
            del self.texts[prompt]
        return rows

    def _conditions(self, prompts: Sequence[str]) -> list[Row]:
        tensors = self.backbone.encode_text(prompts).tensors
        cond = {name: _spec(t) for name, t in tensors.items()}
        self.cond = self.cond or cond
        assert self.cond == cond, f"encode_text gave {cond} for a row, {self.cond} before: pad to a fixed length"
        for name, t in tensors.items():
            _finite(t, f"encode_text's {name!r}", [repr(p) for p in prompts])
        packed = [pack(t) for t in tensors.values()]
        return [{COND + name: raw for name, raw in zip(tensors, row, strict=True)} for row in zip(*packed, strict=True)]

    def _latents(self, read: Read) -> list[Row]:
        import numpy as np
        import torch

        images = torch.from_numpy(np.stack([image for _, image in read if image is not None]))
        x0 = self.backbone.encode(images.permute(0, 3, 1, 2).contiguous().float() / 255).float().cpu()
        assert tuple(x0.shape[1:]) == self.shape, f"encode gave {tuple(x0.shape)}, latent_shape says {self.shape}"
        _finite(x0, "encode", [_name(example) for example, _ in read])
        return [{X0: row} for row in x0.numpy()]

    def null(self) -> dict[str, Tensor]:
        """The condition of one empty prompt, as a file can hold it."""
        null = self.backbone.null(1).tensors
        cond = {name: _spec(t) for name, t in null.items()}
        assert cond == self.cond, f"null gave {cond} for a row, encode_text {self.cond}: they must agree"
        for name, t in null.items():
            _finite(t, f"null's {name!r}", ["the empty prompt"])
        return {name: t.cpu().contiguous().clone() for name, t in null.items()}


def _try(example: Example, size: Sequence[int]) -> tuple[str, Pixels | None, bool]:
    """What is wrong with the example's media, or the picture and whether it was enlarged."""
    try:
        return "", *picture(example.media, size)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise all sorts; each is reported, none is passed over
        return f"{_name(example)}: {type(error).__name__}: {error}", None, False


def _name(example: Example) -> str:
    return str(example.media) if isinstance(example.media, Path) else f"the image of {example.prompt!r}"


def _spec(t: Tensor) -> Spec:
    return Spec(str(t.dtype).removeprefix("torch."), tuple(t.shape[1:]))


def _finite(t: Tensor, what: str, names: Sequence[str]) -> None:
    fine = t.isfinite().reshape(len(t), -1).all(1)
    if not fine.all():
        wrong = [name for name, is_fine in zip(names, fine, strict=True) if not is_fine]
        raise DataError(f"{what} gave NaN or infinity (another dtype for the encoders may help):\n{listed(wrong)}")


def _chunks(items: Iterable[T], n: int) -> Iterator[list[T]]:
    rest = iter(items)
    while chunk := list(islice(rest, n)):
        yield chunk
