"""Draws contact sheets: samples with their prompts, and the comparison of all stages."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from corefit.system.files import write_whole

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont
    from torch import Tensor

    Media = Tensor | NDArray[np.float32] | NDArray[np.float64]

Pixels = NDArray[np.uint8]
SMALLEST = 96
FRAMES, MOVING = 4, 32
"""How many frames of a clip are shown side by side, and in an animation."""
WIDE, HIGH = 1280, 16000
"""Largest animation in pixels: wider ones take seconds to write and to open, and WebP allows 16383."""
GAP = 10
INK, PAPER, NOT_FINITE = (40, 40, 40), (255, 255, 255), (255, 0, 255)


def grid(media: Media, prompts: Sequence[str], png: Path, columns: int = 8, scale: int | None = None) -> None:
    """Write a contact sheet of media [N, 3, H, W] in [0, 1], each above its prompt.

    For video [N, 3, T, H, W] a few frames are drawn side by side. Images are enlarged `scale` times without
    interpolation; the default makes their shorter side at least 96 pixels. Pixels that are not finite are magenta.
    """
    _save(_contact(_enlarge(pixels(media), scale), prompts, columns), png)


def animation(clips: Media, prompts: Sequence[str], webp: Path, columns: int = 4, fps: float = 16) -> None:
    """Write an animated WebP of clips [N, 3, T, H, W] in [0, 1], T frames at `fps`, each above its prompt.

    A long clip is drawn with some of its frames, at its own speed.
    """
    length = clips.shape[2]
    numbers = _spread(length, MOVING)
    sheets: list[Image] = []
    for number in numbers:
        sheets.append(_contact(_enlarge(pixels(clips[:, :, number]), None), prompts, columns))
        sheets[-1].thumbnail((WIDE, HIGH))
    data, pause = io.BytesIO(), round(1000 * length / (fps * len(numbers)))
    sheets[0].save(data, "webp", save_all=True, append_images=sheets[1:], duration=pause, loop=0, method=0)
    write_whole(webp, data.getvalue())


def visible_frames(media: Tensor) -> Tensor:
    """Return the evenly spaced frames of clips [N, 3, T, H, W] that sheets draw; pictures [N, 3, H, W] unchanged."""
    return media[:, :, _spread(media.shape[2], FRAMES)] if media.ndim == 5 else media


def _spread(length: int, most: int) -> list[int]:
    """Return at most `most` evenly spaced frame numbers, including the first and the last."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(int)).tolist()


def _contact(images: Pixels, prompts: Sequence[str], columns: int) -> Image:
    """Draw images [N, H, W, 3], each above its prompt."""
    assert len(images) == len(prompts), "one prompt an image"
    height, width = images.shape[1:3]
    text = _Text.fitting(width)
    captions = [text.wrap(prompt, width) for prompt in prompts]
    columns = max(1, min(columns, len(images)))
    starts = range(0, len(images), columns)
    heights = [height + 5 + text.line * max(map(len, captions[s : s + columns])) + 2 * GAP for s in starts]
    sheet, draw = _sheet(columns * (width + GAP) + GAP, sum(heights) + GAP)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(i, columns)
        left, top = GAP + column * (width + GAP), GAP + sum(heights[:row])
        _paste(sheet, image, left, top)
        text.write(draw, caption, left, top + height + 5)
    return sheet


def comparison(
    rows: Sequence[tuple[str, Media]],
    prompts: Sequence[str],
    png: Path,
    columns: int = 8,
    scale: int | None = None,
) -> None:
    """Write one row for each (stage, media [N, 3, H, W]) and one column for each prompt, in blocks of `columns`.

    Media are in the form that `grid` takes, from the same prompts and noise in every row.
    """
    _save(compared(rows, prompts, columns, scale), png)


def compared(
    rows: Sequence[tuple[str, Media]], prompts: Sequence[str], columns: int = 8, scale: int | None = None
) -> Image:
    """Return the picture that `comparison` writes."""
    images = [(name, _enlarge(pixels(media), scale)) for name, media in rows]
    assert {len(row) for _, row in images} == {len(prompts)}, "one prompt a column"
    width = max(row.shape[2] for _, row in images)
    text = _Text.fitting(width)
    margin = GAP + max(math.ceil(text.bold.getlength(name)) for name, _ in images) + GAP
    captions = [text.wrap(prompt, width) for prompt in prompts]
    starts = range(0, len(prompts), columns)
    heads = [text.line * max(map(len, captions[s : s + columns])) + 5 for s in starts]
    body = sum(row.shape[1] + GAP // 2 for _, row in images)
    wide = margin + max(1, min(columns, len(prompts))) * (width + GAP // 2) + GAP
    sheet, draw = _sheet(wide, sum(heads) + len(heads) * (body + 2 * GAP) + GAP)
    top = GAP
    for start, head in zip(starts, heads, strict=True):
        for i in range(start, min(start + columns, len(prompts))):
            left = margin + (i - start) * (width + GAP // 2)
            text.write(draw, captions[i], left, top + head - 5 - text.line * len(captions[i]))
            _column(sheet, [row[i] for _, row in images], left, top + head)
        _labels(draw, text, [(name, row.shape[1]) for name, row in images], top + head)
        top += head + body + 2 * GAP
    return sheet


def _column(sheet: Image, images: Sequence[Pixels], left: int, top: int) -> None:
    for image in images:
        _paste(sheet, image, left, top)
        top += len(image) + GAP // 2


def _labels(draw: ImageDraw, text: _Text, rows: Sequence[tuple[str, int]], top: int) -> None:
    """Write the stages' names, each at the middle of its row."""
    for name, height in rows:
        draw.text((GAP, top + height // 2), name, INK, text.bold, anchor="lm")
        top += height + GAP // 2


def pixels(media: Media) -> Pixels:
    """Convert media [N, 3, H, W] or [N, 3, T, H, W] to pixels [N, H, W, 3]."""
    values = np.asarray(media if isinstance(media, np.ndarray) else media.detach().float().cpu())
    assert values.shape[1:2] == (3,), f"media are [N, 3, H, W] or [N, 3, T, H, W], not {values.shape}"
    assert values.dtype.kind == "f", f"media are floats in [0, 1], not {values.dtype}"
    still = _strip(values) if values.ndim == 5 else values
    known = np.isfinite(still).all(1)
    levels = np.rint(np.clip(np.where(known[:, None], still, 0), 0, 1) * 255).astype(np.uint8)
    return np.where(known[..., None], levels.transpose(0, 2, 3, 1), np.asarray(NOT_FINITE, np.uint8))


def _strip(clips: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Put evenly spaced frames side by side: [N, 3, T, H, W] -> [N, 3, H, frames W]."""
    return np.concatenate([clips[:, :, number] for number in _spread(clips.shape[2], FRAMES)], axis=-1)


def _enlarge(images: Pixels, scale: int | None) -> Pixels:
    """Enlarge without interpolation: [N, H, W, 3] -> [N, scale H, scale W, 3]."""
    times = math.ceil(SMALLEST / min(images.shape[1:3])) if scale is None else scale
    assert times >= 1, "scale is a whole number from 1"
    return images.repeat(times, 1).repeat(times, 2)


@frozen
class _Text:
    """Writes prompts in a size that suits the images, in matplotlib's font, which has more scripts than Pillow's."""

    font: FreeTypeFont
    bold: FreeTypeFont
    line: int

    @staticmethod
    def fitting(width: int) -> _Text:
        import matplotlib
        from PIL import ImageFont

        fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        size = min(20, max(12, width // 20))
        plain = ImageFont.truetype(fonts / "DejaVuSans.ttf", size)
        return _Text(plain, ImageFont.truetype(fonts / "DejaVuSans-Bold.ttf", size), math.ceil(1.25 * size))

    def wrap(self, prompt: str, width: int, most: int = 5) -> list[str]:
        """Break a prompt into lines no wider than `width` pixels; text beyond `most` lines becomes an ellipsis."""
        lines, rest = [""], prompt.split()
        while rest and len(lines) <= most:
            word = rest.pop(0)
            joined = f"{lines[-1]} {word}".lstrip()
            if self._fits(joined, width):
                lines[-1] = joined
            elif lines[-1]:
                lines.append("")
                rest.insert(0, word)
            else:
                cut = next((n for n in range(len(word) - 1, 1, -1) if self._fits(word[:n], width)), 1)
                lines[-1:] = [word[:cut], ""]
                rest[:0] = [word[cut:]] if word[cut:] else []
        lines = [line for line in lines if line]
        if not rest and len(lines) <= most:
            return lines
        last = lines[most - 1]
        while last and not self._fits(f"{last}…", width):
            last = last[:-1]
        return [*lines[: most - 1], f"{last.rstrip()}…"]

    def write(self, draw: ImageDraw, lines: Sequence[str], left: int, top: int) -> None:
        for i, line in enumerate(lines):
            draw.text((left, top + i * self.line), line, INK, self.font)

    def _fits(self, line: str, width: int) -> bool:
        return self.font.getlength(line) <= width


def _sheet(width: int, height: int) -> tuple[Image, ImageDraw]:
    from PIL import Image, ImageDraw

    sheet = Image.new("RGB", (width, height), PAPER)
    return sheet, ImageDraw.Draw(sheet)


def _paste(sheet: Image, pixels: Pixels, left: int, top: int) -> None:
    from PIL import Image

    sheet.paste(Image.fromarray(pixels), (left, top))


def _save(sheet: Image, png: Path) -> None:
    data = io.BytesIO()
    sheet.save(data, "png")
    write_whole(png, data.getvalue())
