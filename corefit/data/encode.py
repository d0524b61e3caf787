"""Encode raw examples into rows of a cache: decode media, run text encoders and VAE, and score with rewards."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from attrs import Factory, define, field, frozen

from corefit.data.buckets import Size, nearest
from corefit.data.coding import Coder
from corefit.data.dataset import COND, latents_column, pack
from corefit.data.mds import Row, TensorSpec
from corefit.data.settings import Data
from corefit.data.sources import dimensions, listed, view
from corefit.errors import DataError, Unreachable
from corefit.types import rewards

if TYPE_CHECKING:
    from torch import Tensor

    from corefit.data.sources import View
    from corefit.types import Backbone, Example, Reward, Weighted

TEXT_CACHE_SIZE = 256
"""How many encoded prompts are kept in memory, in case the same prompt occurs again."""

T = TypeVar("T")


@frozen(eq=False)
class DecodedExample:
    """An example with its decoded media and their bucket, or the reason why decoding one of them failed.

    views  the decoded media by name: the main one, which chooses the bucket, is named ""
    """

    example: Example
    bucket: int = 0
    views: Mapping[str, View] = field(factory=dict[str, "View"])
    error: str = ""


@define
class Encoder:
    """Encodes examples into rows of a cache, and records which media could not be read.

    sizes     the size of each bucket, in pixels
    shapes    the shape of one row's latents in each bucket
    failed    a message for each example whose media could not be read so far
    cond      dtype and shape of each tensor of a condition, known after the first prompt
    texts     the encoded prompts that are kept in memory
    enlarged  how many examples have media that are smaller than their bucket's size
    extra     the names of the further media to encode
    coder     encodes the media, as many of `encode_batch` at once as fit
    """

    data: Data
    backbone: Backbone
    media: bool
    sizes: Sequence[Size]
    shapes: Sequence[tuple[int, ...]]
    failed: list[str] = field(factory=list[str])
    cond: dict[str, TensorSpec] = field(factory=dict[str, TensorSpec])
    texts: dict[str, Row] = field(factory=dict[str, Row])
    enlarged: int = 0
    extra: Sequence[str] = ()
    coder: Coder = field(default=Factory(lambda self: Coder(self.backbone), takes_self=True))

    def rows(self, examples: Sequence[Example]) -> Iterator[Row]:
        """Yield the rows of `examples`; after more than `skip` failures, only decode media, so that all are listed."""
        frames = math.prod(self.sizes[0][:-2])
        for window in chunks(examples, self.data.encode_batch * max(1, 4 * len(self.sizes) // frames)):
            decoded = self._decode(window)
            if len(self.failed) <= self.data.skip:
                yield from self._encode(decoded)

    def _decode(self, examples: Sequence[Example]) -> list[DecodedExample]:
        """Decode the media of `examples`; leave out and record those that cannot be read."""
        if not self.media:
            return [DecodedExample(example) for example in examples]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            results = list(pool.map(self._decode_one, examples))
        self.failed += [each.error for each in results if each.error]
        self.enlarged += sum(any(view.enlarged for view in each.views.values()) for each in results)
        return [each for each in results if not each.error]

    def _decode_one(self, example: Example) -> DecodedExample:
        media, views, name = {"": example.media, **example.extra}, dict[str, "View"](), ""
        try:
            bucket = nearest(*dimensions(example.media), self.sizes) if len(self.sizes) > 1 else 0
            for name in ("", *self.extra):
                views[name] = view(media[name], self.sizes[bucket], self.data.fps)
            return DecodedExample(example, bucket, views)
        except (MemoryError, Unreachable):  # neither says anything about the medium
            raise
        except Exception as error:  # decoders raise exceptions of all kinds, and each is reported
            return DecodedExample(example, error=f"{display_name(example, name)}: {type(error).__name__}: {error}")

    def _encode(self, decoded: Sequence[DecodedExample]) -> Iterator[Row]:
        """Yield a row for each example, in order, whichever buckets they are in."""
        texts = self._encode_texts([prompt for one in decoded for prompt in one.example.prompts])
        media = self._encode_media(decoded) if self.media else [({}, {}) for _ in decoded]
        for one, (latents, scores) in zip(decoded, media, strict=True):
            prompts = one.example.prompts
            rows = [texts[prompt] for prompt in prompts]
            yield {
                "prompts": list(prompts),
                "meta": {**one.example.meta, **scores},
                "view": _view_info(one, self.sizes),
                "bucket": one.bucket,
                **{name: b"".join(row[name] for row in rows) for name in rows[0]},
                **latents,
            }

    def _encode_texts(self, prompts: Sequence[str]) -> dict[str, Row]:
        """Return the encoded condition of each prompt; a prompt that is kept in memory is not encoded again."""
        for batch in chunks((p for p in dict.fromkeys(prompts) if p not in self.texts), self.data.encode_batch):
            self.texts.update(zip(batch, self._encode_text_batch(batch), strict=True))
        found = {prompt: self.texts[prompt] for prompt in prompts}
        for prompt in list(self.texts)[:-TEXT_CACHE_SIZE]:
            del self.texts[prompt]
        return found

    def _encode_text_batch(self, prompts: Sequence[str]) -> list[Row]:
        tensors = self.backbone.encode_text(prompts).tensors
        cond = {name: _tensor_spec(t) for name, t in tensors.items()}
        self.cond = self.cond or cond
        assert self.cond == cond, f"encode_text gave {cond} for a row, {self.cond} before: pad to a fixed length"
        for name, t in tensors.items():
            _check_finite(t, f"encode_text's {name!r}", [repr(p) for p in prompts])
        packed = [pack(t) for t in tensors.values()]
        return [{COND + name: raw for name, raw in zip(tensors, row, strict=True)} for row in zip(*packed, strict=True)]

    def _encode_media(self, decoded: Sequence[DecodedExample]) -> Sequence[tuple[Row, Row]]:
        """Return (latents by column, scores by name) of each example, encoded bucket by bucket."""
        rows = [(dict[str, Any](), dict[str, Any]()) for _ in decoded]
        for bucket in range(len(self.sizes)):
            members = (n for n, one in enumerate(decoded) if one.bucket == bucket)
            for batch in chunks(members, self.data.encode_batch):
                for name in ("", *self.extra):
                    encoded = self._encode_media_batch([decoded[n] for n in batch], name, bucket)
                    for n, (latents, scores) in zip(batch, encoded, strict=True):
                        rows[n][0].update(latents)
                        rows[n][1].update(scores)
        return rows

    def _encode_media_batch(self, decoded: Sequence[DecodedExample], name: str, bucket: int) -> list[tuple[Row, Row]]:
        """Return (latents, scores) of the medium `name` of each example, all of one bucket."""
        import numpy as np
        import torch

        pixels = torch.from_numpy(np.stack([one.views[name].pixels for one in decoded]))
        media = pixels.movedim(-1, 1).contiguous().float() / 255
        x0, shape = self.coder.encode(media).float().cpu(), self.shapes[bucket]
        assert tuple(x0.shape[1:]) == shape, f"encode gave {tuple(x0.shape)}, latent_shape says {shape}"
        names = [display_name(one.example, name) for one in decoded]
        _check_finite(x0, "encode", names)
        scores = [self._scores(entry, name, media, [one.example for one in decoded]) for entry in self.data.score]
        column = latents_column(name)
        return [({column: row}, dict(scored)) for row, *scored in zip(x0.numpy(), *scores, strict=True)]

    def _scores(
        self, entry: Weighted[Reward], name: str, media: Tensor, examples: Sequence[Example]
    ) -> list[tuple[str, float]]:
        prompts, metas = [example.prompts[0] for example in examples], [example.meta for example in examples]
        scores, key = rewards.score(entry, media, prompts, metas), f"{name}/{entry.name}" if name else entry.name
        rewards.refuse_non_finite({key: scores}, [display_name(example, name) for example in examples])
        for example in examples:
            if key in example.meta:
                raise DataError(f"score: {key!r} is already metadata of {display_name(example)}; rename one of the two")
        return [(key, score) for score in scores.tolist()]

    def null(self) -> dict[str, Tensor]:
        """Return the condition of one empty prompt, as contiguous tensors on the CPU that safetensors can save."""
        null = self.backbone.null(1).tensors
        cond = {name: _tensor_spec(t) for name, t in null.items()}
        assert cond == self.cond, f"null gave {cond} for a row, encode_text {self.cond}: they must agree"
        for name, t in null.items():
            _check_finite(t, f"null's {name!r}", ["the empty prompt"])
        return {name: t.cpu().contiguous().clone() for name, t in null.items()}


def _view_info(decoded: DecodedExample, sizes: Sequence[Size]) -> dict[str, Any]:
    """Return the size of an example's bucket, and for each medium the size of its source and the crop that was kept."""
    if not decoded.views:
        return {}
    seen = {name: {"source": list(one.source), "crop": list(one.crop)} for name, one in decoded.views.items()}
    main = seen.pop("")
    return {"size": list(sizes[decoded.bucket]), **main, **({"extra": seen} if seen else {})}


def display_name(example: Example, name: str = "") -> str:
    """Return what messages call an example, or its further medium `name`: the file, or the prompt."""
    media: Any = example.extra[name] if name else example.media
    file = str(media) if isinstance(media, Path) else getattr(media, "name", None)
    return file or f"the {f'{name} ' if name else ''}media of {example.prompts[0]!r}"


def _tensor_spec(t: Tensor) -> TensorSpec:
    return TensorSpec(str(t.dtype).removeprefix("torch."), tuple(t.shape[1:]))


def _check_finite(t: Tensor, what: str, names: Sequence[str]) -> None:
    finite = t.isfinite().reshape(len(t), -1).all(1)
    if not finite.all():
        wrong = [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]
        raise DataError(f"{what} gave NaN or infinity (another dtype for the encoders may help):\n{listed(wrong)}")


def chunks(items: Iterable[T], n: int) -> Iterator[list[T]]:
    """Yield the items in lists of n; the last list may be shorter."""
    rest = iter(items)
    while chunk := list(islice(rest, n)):
        yield chunk
