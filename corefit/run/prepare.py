"""Encodes the data and prompts of a pipeline, for `corefit run`, `show` and `prepare`, or finds them in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corefit.data import cache
from corefit.data.dataset import Dataset, filtered_key
from corefit.data.settings import Data
from corefit.errors import counted
from corefit.pipeline.pipeline import Pipeline
from corefit.run import agreement
from corefit.system import files
from corefit.system.display import Display
from corefit.system.homes import Homes
from corefit.system.ranks import Ranks, join
from corefit.system.signals import ECHO, Signals


def prepare(pipeline: Pipeline, display: Display | None = None) -> Dataset:
    """Run `corefit prepare`: encode what is not in the cache yet, and print a summary. Every rank encodes its share."""
    ranks = join(pipeline.precision, pipeline.layout)
    display = display or Display.on(ranks.main)
    with Signals(display.print, ECHO).handled():
        agreement.check(ranks, pipeline, "prepare")
        with display, ranks.share_failures(root(pipeline)), files.explain_write_errors(root(pipeline)):
            dataset, _ = encode(pipeline, ranks, display)
    for line in summary(dataset):
        display.print(line)
    return dataset


def encode(pipeline: Pipeline, ranks: Ranks, display: Display) -> tuple[Dataset, Dataset | None]:
    """Return the data and the prompts of [eval], encoded now if not cached. Releases text encoders and VAE."""
    pipeline.backbone.place(ranks.device, text_dtype(ranks))
    dataset = _encode(pipeline, pipeline.data, ranks, display, "encoding data", media=pipeline.needs_media)
    prompts = pipeline.eval and _encode(
        pipeline, pipeline.eval.data(pipeline.data.size), ranks, display, "encoding prompts", media=False
    )
    pipeline.backbone.release()
    return dataset, prompts


def _encode(pipeline: Pipeline, data: Data, ranks: Ranks, display: Display, title: str, *, media: bool) -> Dataset:
    backbone, folder, extra = pipeline.backbone, root(pipeline), pipeline.further_media if media else ()
    if data.encoded:
        with ranks.main_first():
            return cache.open_encoded(data, backbone, folder, media=media, extra=extra)
    homes = Homes.find(folder, ranks)  # machines that do not share the cache encode all of the data each for itself
    with display.task(title, idle="cached") as progress:
        folder = cache.prepare(
            data, backbone, folder, media=media, extra=extra, progress=progress, ranks=homes.local, say=display.print
        )
    if data.left_out:
        display.print(f"data: {data.left_out}")
    dataset = Dataset.open(folder, keep=data.filter, rebuildable=True)
    agreement.refuse_differences(ranks, {"examples": dataset.key[:12]})
    return dataset


def preview(pipeline: Pipeline, data: Any, *, media: bool) -> tuple[str, int, str]:
    """Return the cache key of the data, how many examples there are, and what `encode` would do; write nothing.

    The backbone must have been placed: the key depends on its dtype.
    """
    backbone, folder, extra = pipeline.backbone, root(pipeline), pipeline.further_media if media else ()
    if data.encoded:
        found = cache.open_encoded(data, backbone, folder, media=media, extra=extra)
        return found.key, len(found), f"{counted(len(found), 'example')}, encoded before"
    count = cache.check(data, media=media, extra=extra) or 0
    key = cache.key(data, backbone, folder, media=media, extra=extra)
    cached = cache.exists(data, backbone, folder, media=media, extra=extra)
    filtered = f", of which {data.keep!r} keeps some" if data.keep else ""
    text = f"{counted(count, 'example')}{filtered}{', cached' if cached else ' to encode'}"
    return filtered_key(key, data.filter), count, text


def summary(dataset: Dataset) -> Iterator[str]:
    """Yield lines on a data set: how many examples, their size, the buckets, and the values that `keep` filters by."""
    manifest = dataset.manifest
    size = dataset.shards.bytes + (dataset.texts.shards.bytes if dataset.texts else 0)
    left_out = [f"{manifest.skipped} unreadable and left out"] if manifest.skipped else []
    enlarged = [f"{manifest.enlarged} smaller than their size"] if manifest.enlarged else []
    each = f"{size / max(1, manifest.count) / 1024:.1f} KiB each"
    further = [f"each with {' and '.join(manifest.extra)}"] if manifest.extra else []
    yield ", ".join([counted(manifest.count, "example"), *further, *left_out, *enlarged, each])
    for number, rows in dataset.buckets.items():
        pixels, latents = (" x ".join(map(str, sizes[number])) for sizes in (manifest.sizes, manifest.shapes))
        yield f"  {pixels} pixels, latents {latents}: {counted(len(rows), 'example')}"
    if dataset.keep:
        yield f"kept by {dataset.keep.text!r}: {len(dataset)} of {manifest.count}"
        for column in dataset.columns:
            yield from (f"  {column.name} {line}" for line in column.histogram())


def root(pipeline: Pipeline) -> Path:
    """Return the folder of the cache of encoded data."""
    return pipeline.folder / ".corefit" / "cache"


def precision(ranks: Ranks) -> str:
    """Return the precision of the computation: "bf16" or "fp32"."""
    return "bf16" if ranks.accelerator.mixed_precision == "bf16" else "fp32"


def text_dtype(ranks: Ranks) -> Any:
    """Return the dtype of text encoders: the same for all stages and evaluation, whatever they train."""
    import torch

    return torch.bfloat16 if precision(ranks) == "bf16" else torch.float32
