"""The pictures of a page as data URLs: kept samples, the grids of checkpoints, clips that move."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from corefit.run.report.page.folder import StageFiles
from corefit.run.report.page.memo import Memo

SMALL = 128
"""Pictures of at most this many pixels a side are embedded as they are, larger ones as JPEG."""
SIDES = ((60, 640), (150, 448), (400, 320))
"""Up to how many pictures a page has them with how many pixels a side; more are left out."""
SHEET = 1600
"""Pixels of width that a grid of samples is scaled down to."""
SHEETS = 12
"""Grids of a stage; of more, evenly spaced ones are shown."""
MOVING = 3 * 2**20
"""Bytes of the largest animation that a page has."""

Pixels = NDArray[np.uint8]


@frozen(eq=False)
class Kept:
    """The samples that were kept of one stage: of the first prompts, then of those that scored best and worst."""

    rows: Sequence[int]
    """The numbers of their prompts."""
    media: Sequence[Pixels]
    """[3, H, W] each, or frames of a clip [3, T, H, W]."""
    first: int
    """How many are of the first prompts."""


def kept(stage: StageFiles, memo: Memo) -> Kept | None:
    """Read the samples of a stage's last evaluation; None if there are none."""
    return memo.of("media", _files(stage), lambda: _kept(*_files(stage)))


def _files(stage: StageFiles) -> tuple[Path, Path]:
    return stage.folder / "samples" / "last.safetensors", stage.folder / "samples" / "extremes.safetensors"


def _kept(first: Path, more: Path) -> Kept | None:
    shown, extremes = _read(first), _read(more)
    if not shown:
        return None
    further = {row: media for row, media in extremes.items() if row not in shown}
    return Kept([*shown, *further], [*shown.values(), *further.values()], len(shown))


def _read(file: Path) -> dict[int, Pixels]:
    """Return row -> its media; nothing of a file that is missing, damaged or of another kind."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            media = cast(Pixels, opened.get_tensor("media"))
            metadata = cast(Mapping[str, str], opened.metadata() or {})
        rows = json.loads(metadata.get("rows", "null")) or range(len(media))
        if media.dtype != np.uint8 or media.ndim not in (4, 5) or media.shape[1] != 3 or not media.size:
            return {}
        return {int(row): each for row, each in zip(rows, media, strict=True)}
    except (OSError, TypeError, ValueError, SafetensorError):
        return {}


def size_for(counts: Sequence[int]) -> tuple[int, int]:
    """Return the pixels a side of the pictures of stages that have so many, and how many a stage may have."""
    for most, side in SIDES:
        if sum(counts) <= most:
            return side, max(counts, default=0)
    most, side = SIDES[-1]
    return side, max(1, most // len(counts))


def sources(stage: StageFiles, side: int, most: int, memo: Memo) -> dict[int, str]:
    """Return row -> the data URL of its picture, for at most `most` of a stage's kept samples."""
    return memo.of(("pictures", side, most), _files(stage), lambda: _sources(kept(stage, memo), side, most))


def _sources(found: Kept | None, side: int, most: int) -> dict[int, str]:
    if found is None:
        return {}
    return {row: _encoded(_still(one), side) for row, one in [*zip(found.rows, found.media, strict=True)][:most]}


def _still(media: Pixels) -> Pixels:
    """Return one sample as pixels [H, W, 3], the frames of a clip side by side."""
    picture = np.concatenate(list(media.transpose(1, 0, 2, 3)), axis=-1) if media.ndim == 4 else media
    return np.ascontiguousarray(picture.transpose(1, 2, 0))


def _encoded(pixels: Pixels, side: int) -> str:
    from PIL import Image

    image, data = Image.fromarray(pixels), io.BytesIO()
    if max(image.size) <= SMALL:
        image.save(data, "png")
        return _url(data.getvalue(), "png")
    image.thumbnail((side * max(1, image.width // max(1, image.height)), side))
    image.save(data, "jpeg", quality=84)
    return _url(data.getvalue(), "jpeg")


def sheets(stage: StageFiles, memo: Memo) -> list[dict[str, str]]:
    """Return name and source of a stage's sample grids, in the order of training."""
    files, steps = stage.sheets, stage.about.get("steps")
    chosen = sorted({round(i) for i in np.linspace(0, len(files) - 1, min(len(files), SHEETS))})
    found: list[dict[str, str]] = []
    for file in (files[i] for i in chosen):
        if source := memo.of("sheet", [file], lambda file=file: _sheet(file)):
            step = file.stem.removeprefix("step-").lstrip("0") or "0"
            found.append({"name": f"step {step} of {steps}" if steps else f"step {step}", "source": source})
    return found


def _sheet(file: Path) -> str:
    """Return a grid as it is if it is small, else as a JPEG; nothing for what is no picture."""
    from PIL import Image

    try:
        data = file.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            if len(data) <= 64 * 1024 and image.width <= SHEET:
                return _url(data, "png")
            smaller, output = image.convert("RGB"), io.BytesIO()
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    smaller.thumbnail((SHEET, 10 * SHEET))
    smaller.save(output, "jpeg", quality=82)
    return _url(output.getvalue(), "jpeg")


def moving(stage: StageFiles, memo: Memo) -> str:
    """Return the animation of a stage's clips, or nothing where there is none, or a heavy one."""
    file = stage.folder / "samples" / "last.webp"
    return memo.of("moving", [file], lambda: _moving(file))


def _moving(file: Path) -> str:
    try:
        light = file.stat().st_size <= MOVING
        return _url(file.read_bytes(), "webp") if light else ""
    except OSError:
        return ""


def _url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def prompts_of(stages: Sequence[StageFiles], memo: Memo) -> dict[int, str]:
    """Return row -> prompt of all kept samples, or the prompt's number where scores.json does not tell it."""
    rows = {row for stage in stages if (media := kept(stage, memo)) for row in media.rows}
    lists = [scored for stage in stages if isinstance(scored := stage.scores.get("prompts"), list)]
    every = cast(list[Any], max(lists, key=len, default=[]))
    return {row: str(every[row]) if row < len(every) else f"prompt {row + 1}" for row in sorted(rows)}


def scores_of(stages: Sequence[StageFiles], rows: Sequence[int]) -> dict[str, dict[str, dict[int, float]]]:
    """Return metric -> stage -> row -> score of the samples that have pictures."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for stage in stages:
        values = stage.scores.get("values")
        for metric, each in (cast(dict[str, Any], values) if isinstance(values, dict) else {}).items():
            if isinstance(each, list):
                numbers = cast(list[Any], each)
                known = {row: numbers[row] for row in rows if row < len(numbers) and type(numbers[row]) in (int, float)}
                found.setdefault(metric, {})[stage.key] = known
    return found


def is_small(stages: Sequence[StageFiles], memo: Memo) -> bool:
    """Return whether the pictures are so small that the page shows their pixels."""
    shapes = [media.media[0].shape[-2:] for stage in stages if (media := kept(stage, memo))]
    return bool(shapes) and max(map(max, shapes)) <= SMALL
