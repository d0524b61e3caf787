"""Raw examples -> rows of a cache: media are read, text encoders, VAE and rewards are asked once."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from attrs import define, field, frozen

from corefit.data.buckets import Size, nearest
from corefit.data.dataset import COND, X0, Spec, pack
from corefit.data.mds import Row
from corefit.data.settings import Data
from corefit.data.sources import dimensions, listed, view
from corefit.errors import DataError
from corefit.types import rewards

if TYPE_CHECKING:
    from torch import Tensor

    from corefit.data.sources import View
    from corefit.types import Backbone, Example, Reward, Weighted

REMEMBERED = 256
"""Encoded prompts that are kept for those that come again."""

T = TypeVar("T")


@frozen(eq=False)
class DecodedExample:
    """An example as it was read: its bucket and what is left of its media, or why that failed."""

    example: Example
    bucket: int = 0
    view: View | None = None
    failed: str = ""


@define
class Encoder:
    """Turns examples into rows of the cache, and keeps account of what it could not read.

    sizes   of the buckets, in pixels
    shapes  of one row's latents of each
    """

    data: Data
    backbone: Backbone
    media: bool
    sizes: Sequence[Size]
    shapes: Sequence[tuple[int, ...]]
    failed: list[str] = field(factory=list[str])
    cond: dict[str, Spec] = field(factory=dict[str, Spec])
    texts: dict[str, Row] = field(factory=dict[str, Row])
    enlarged: int = 0

    def rows(self, examples: Sequence[Example]) -> Iterator[Row]:
        """Past the budget the rest is still opened, so that all unreadable media are listed, but not encoded."""
        frames = math.prod(self.sizes[0][:-2])
        for window in chunks(examples, self.data.encode_batch * max(1, 4 * len(self.sizes) // frames)):
            read = self._read(window)
            if len(self.failed) <= self.data.skip:
                yield from self._encoded(read)

    def _read(self, examples: Sequence[Example]) -> list[DecodedExample]:
        """Those that could be."""
        if not self.media:
            return [DecodedExample(example) for example in examples]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            tried = list(pool.map(self._try, examples))
        self.failed += [read.failed for read in tried if read.failed]
        self.enlarged += sum(read.view.enlarged for read in tried if read.view)
        return [read for read in tried if read.view]

    def _try(self, example: Example) -> DecodedExample:
        try:
            bucket = nearest(*dimensions(example.media), self.sizes) if len(self.sizes) > 1 else 0
            return DecodedExample(example, bucket, view(example.media, self.sizes[bucket], self.data.fps))
        except MemoryError:
            raise
        except Exception as error:  # decoders raise all sorts; each is reported, none is passed over
            return DecodedExample(example, failed=f"{name_of(example)}: {type(error).__name__}: {error}")

    def _encoded(self, read: Sequence[DecodedExample]) -> Iterator[Row]:
        """A row each, in order, whatever buckets they are in."""
        texts = self._texts([prompt for one in read for prompt in one.example.prompts])
        media = self._media(read) if self.media else [({}, {}) for _ in read]
        for one, (latents, scores) in zip(read, media, strict=True):
            prompts = one.example.prompts
            rows = [texts[prompt] for prompt in prompts]
            yield {
                "prompts": list(prompts),
                "meta": {**one.example.meta, **scores},
                "view": _shown(one, self.sizes),
                "bucket": one.bucket,
                **{name: b"".join(row[name] for row in rows) for name in rows[0]},
                **latents,
            }

    def _texts(self, prompts: Sequence[str]) -> dict[str, Row]:
        """Of each prompt; those that occur again are not encoded again while they are remembered."""
        for part in chunks((p for p in dict.fromkeys(prompts) if p not in self.texts), self.data.encode_batch):
            self.texts.update(zip(part, self._conditions(part), strict=True))
        found = {prompt: self.texts[prompt] for prompt in prompts}
        for prompt in list(self.texts)[:-REMEMBERED]:
            del self.texts[prompt]
        return found

    def _conditions(self, prompts: Sequence[str]) -> list[Row]:
        tensors = self.backbone.encode_text(prompts).tensors
        cond = {name: _spec(t) for name, t in tensors.items()}
        self.cond = self.cond or cond
        assert self.cond == cond, f"encode_text gave {cond} for a row, {self.cond} before: pad to a fixed length"
        for name, t in tensors.items():
            _finite(t, f"encode_text's {name!r}", [repr(p) for p in prompts])
        packed = [pack(t) for t in tensors.values()]
        return [{COND + name: raw for name, raw in zip(tensors, row, strict=True)} for row in zip(*packed, strict=True)]

    def _media(self, read: Sequence[DecodedExample]) -> list[tuple[Row, Row]]:
        """(latents, scores) of each, made bucket by bucket."""
        made: dict[int, tuple[Row, Row]] = {}
        for bucket in range(len(self.sizes)):
            for part in chunks((n for n, one in enumerate(read) if one.bucket == bucket), self.data.encode_batch):
                rows = self._batch([read[n] for n in part], bucket)
                made.update(zip(part, rows, strict=True))
        return [made[n] for n in range(len(read))]

    def _batch(self, read: Sequence[DecodedExample], bucket: int) -> list[tuple[Row, Row]]:
        import numpy as np
        import torch

        pixels = torch.from_numpy(np.stack([one.view.pixels for one in read if one.view]))
        media = pixels.movedim(-1, 1).contiguous().float() / 255
        x0, shape = self.backbone.encode(media).float().cpu(), self.shapes[bucket]
        assert tuple(x0.shape[1:]) == shape, f"encode gave {tuple(x0.shape)}, latent_shape says {shape}"
        _finite(x0, "encode", [name_of(one.example) for one in read])
        scores = [self._scores(entry, media, [one.example for one in read]) for entry in self.data.score]
        return [({X0: row}, dict(scored)) for row, *scored in zip(x0.numpy(), *scores, strict=True)]

    def _scores(self, entry: Weighted[Reward], media: Tensor, examples: Sequence[Example]) -> list[tuple[str, float]]:
        prompts, metas = [example.prompts[0] for example in examples], [example.meta for example in examples]
        scores = rewards.score(entry, media, prompts, metas)
        rewards.refuse_non_finite({entry.name: scores}, list(map(name_of, examples)))
        for example in examples:
            if entry.name in example.meta:
                raise DataError(
                    f"score: {entry.name!r} is metadata of {name_of(example)} already; rename it, or drop the score"
                )
        return [(entry.name, score) for score in scores.tolist()]

    def null(self) -> dict[str, Tensor]:
        """The condition of one empty prompt, as a file can hold it."""
        null = self.backbone.null(1).tensors
        cond = {name: _spec(t) for name, t in null.items()}
        assert cond == self.cond, f"null gave {cond} for a row, encode_text {self.cond}: they must agree"
        for name, t in null.items():
            _finite(t, f"null's {name!r}", ["the empty prompt"])
        return {name: t.cpu().contiguous().clone() for name, t in null.items()}


def _shown(read: DecodedExample, sizes: Sequence[Size]) -> dict[str, Any]:
    """What became of the media: the size it has now, the size it had, and which part of it was kept."""
    if read.view is None:
        return {}
    return {"size": list(sizes[read.bucket]), "source": list(read.view.source), "crop": list(read.view.crop)}


def name_of(example: Example) -> str:
    """What messages call it: its file, or its prompt."""
    media: Any = example.media
    named = str(media) if isinstance(media, Path) else getattr(media, "name", None)
    return named or f"the media of {example.prompts[0]!r}"


def _spec(t: Tensor) -> Spec:
    return Spec(str(t.dtype).removeprefix("torch."), tuple(t.shape[1:]))


def _finite(t: Tensor, what: str, names: Sequence[str]) -> None:
    fine = t.isfinite().reshape(len(t), -1).all(1)
    if not fine.all():
        wrong = [name for name, is_fine in zip(names, fine, strict=True) if not is_fine]
        raise DataError(f"{what} gave NaN or infinity (another dtype for the encoders may help):\n{listed(wrong)}")


def chunks(items: Iterable[T], n: int) -> Iterator[list[T]]:
    """Lists of n in order, the last shorter."""
    rest = iter(items)
    while chunk := list(islice(rest, n)):
        yield chunk
