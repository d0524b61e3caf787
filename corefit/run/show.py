"""`corefit show`: draws the first examples that a stage trains on, decoded, with prompt, size and crop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corefit.data.dataset import Dataset
from corefit.data.order import BatchSampler
from corefit.errors import ConfigError
from corefit.pipeline.pipeline import Pipeline
from corefit.run import report
from corefit.run.prepare import encode, summary, text_dtype
from corefit.system.display import Display
from corefit.system.ranks import join
from corefit.types.objective import reads_media
from corefit.types.stage import Stage

if TYPE_CHECKING:
    from torch import Tensor


def show(pipeline: Pipeline, number: int, file: Path | None = None, display: Display | None = None) -> Path:
    """Write a grid of the first `number` different examples of the first stage that trains on media.

    Further media that any stage reads, such as the rejected picture of a pair, are on the right of the main one.
    Data that are not in the cache are encoded first. The default file is data.png in the run's folder.
    """
    stage = next((stage for stage in pipeline.stage if reads_media(stage.objective)), None)
    if stage is None:
        raise ConfigError("no stage trains on media, so there is nothing to show; the prompts are in the source")
    ranks = join(pipeline.precision, pipeline.layout)
    display, png = display or Display.on(ranks.main), file or pipeline.run_folder / "data.png"
    with display:
        dataset, _ = encode(pipeline, ranks, display)
    pipeline.backbone.place(ranks.device, text_dtype(ranks))
    drawn = list(islice(_drawn(pipeline, stage, dataset), number))
    media = [_decoded(pipeline, dataset, index, turn, pipeline.further_media) for index, turn in drawn]
    pipeline.backbone.release()
    png.parent.mkdir(parents=True, exist_ok=True)
    report.grid(_framed([pixels for pixels, _ in media]), [caption for _, caption in media], png)
    for line in summary(dataset):
        display.print(line)
    display.print(f"the first {len(drawn)} are in {png}")
    return png


def _drawn(pipeline: Pipeline, stage: Stage, dataset: Dataset) -> Iterator[tuple[int, float]]:
    """Yield (index of an example, which of its captions) in the order of training, each example once."""
    batches = BatchSampler(
        buckets=list(dataset.buckets.values()),
        batch=stage.rows,
        group=stage.objective.group_size,
        seed=pipeline.seed,
        stage=stage.name,
        order=pipeline.data.order,
    )
    seen: set[int] = set()
    for step in count():
        for index, turn in zip(batches.indices(step), batches.caption_choices(step), strict=True):
            if index not in seen:
                seen.add(index)
                yield index, turn
        if len(seen) == len(dataset):
            return


def _decoded(pipeline: Pipeline, dataset: Dataset, index: int, turn: float, extra: Sequence[str]) -> tuple[Tensor, str]:
    """Return an example's media decoded, side by side, [3, H, n W] or [3, T, H, n W], and its caption in the grid."""
    import torch

    batch, view = dataset.batch([index], [0], [turn], extra), dataset.view(index)
    with torch.no_grad():
        media = [pipeline.backbone.decode(x0)[0].cpu() for x0 in (batch.clean, *batch.extra.values())]
    *_, height, width = view["size"]
    crops = [_crop(view), *(f"{name} {_crop(view['extra'][name])}" for name in extra)]
    return torch.cat(media, -1), f"{batch.prompts[0]} | {width} x {height}, {', '.join(crops)}"


def _crop(view: Mapping[str, Any]) -> str:
    """Return which part of the source a medium is, in words."""
    left, top, right, bottom = (round(edge) for edge in view["crop"])
    height, width = view["source"]
    crop = "all" if (left, top, right, bottom) == (0, 0, width, height) else f"{left},{top} to {right},{bottom}"
    return f"{crop} of {width} x {height}"


def _framed(media: Sequence[Tensor]) -> Tensor:
    """Center media of all buckets on white sheets of one size, [n, 3, (T,) H, W]."""
    import torch

    height, width = (max(m.shape[axis] for m in media) for axis in (-2, -1))
    sheets = torch.ones(len(media), *media[0].shape[:-2], height, width)
    for sheet, m in zip(sheets, media, strict=True):
        top, left = (height - m.shape[-2]) // 2, (width - m.shape[-1]) // 2
        sheet[..., top : top + m.shape[-2], left : left + m.shape[-1]] = m
    return sheets
