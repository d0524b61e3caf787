"""Decode media: turn pictures and clips upright, scale and crop them to a size, and return their pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from corefit.data.sources import pictures, video
from corefit.types import ArchiveMember

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    Pixels = NDArray[np.uint8]

MEDIA = pictures.PICTURES | video.VIDEOS


@frozen(eq=False)
class View:
    """The decoded pixels of an example's media after scaling and cropping.

    pixels    uint8 [height, width, 3], or [frames, height, width, 3] for clips
    enlarged  whether the source was smaller in height or width
    source    (height, width) of the upright source
    crop      (left, top, right, bottom) of the part of the source that was kept, in its pixels
    """

    pixels: Pixels
    enlarged: bool
    source: tuple[int, int]
    crop: tuple[float, float, float, float]


def view(media: Path | ArchiveMember | Any, size: Sequence[int], fps: float | None = None) -> View:
    """Decode media to `size`: [height, width] for pictures, [frames, height, width] for clips.

    Media are turned upright (EXIF), transparency is put over white, 16-bit gray is scaled to 8 bits; the center crop
    with the aspect ratio of `size` is resized (Lanczos, antialiased). A clip gives its first frames, at `fps` or at
    its own rate. Raises what the decoder raises; ValueError for a clip that is too short, for a picture where `size`
    is for clips, or the reverse.
    """
    import numpy as np

    *frames, height, width = size
    images = video.frames(_require_clip(media), frames[0], fps) if frames else iter([_picture(media)])
    first = next(images)
    crop = _crop(first.width, first.height, width / height)
    resized = [_resized(image, crop, (width, height)) for image in chain([first], _check_sizes(images, first.size))]
    enlarged = first.width < width or first.height < height
    return View(np.stack(resized) if frames else resized[0], enlarged, (first.height, first.width), crop)


def dimensions(media: Path | ArchiveMember | Any) -> tuple[int, int]:
    """Return the upright height and width; of a picture no pixels are decoded, of a clip only the first frame."""
    import numpy as np

    if not isinstance(media, (Path, ArchiveMember)):
        height, width = np.asarray(media).shape[-3:-1]
        return int(height), int(width)
    return video.dimensions(media) if video.is_clip(media) else pictures.dimensions(media)


def _picture(media: Path | ArchiveMember | Any) -> Image:
    if video.is_clip(media):
        raise ValueError("this is a clip, and size = [height, width] is for pictures; give [frames, height, width]")
    return pictures.upright(media)


def _require_clip(media: Path | ArchiveMember | Any) -> Any:
    if not video.is_clip(media):
        raise ValueError("this is a picture, and size = [frames, height, width] is for clips; give [height, width]")
    return media


def _check_sizes(images: Iterator[Image], size: tuple[int, int]) -> Iterator[Image]:
    for number, image in enumerate(images, 2):
        if image.size != size:
            raise ValueError(
                f"frame {number} has {image.width} x {image.height} pixels, the first {size[0]} x {size[1]}; "
                "all frames of a clip must have one size"
            )
        yield image


def _crop(width: int, height: int, ratio: float) -> tuple[float, float, float, float]:
    """Return the largest centered box with the aspect ratio `ratio` (width / height): (left, top, right, bottom)."""
    across, down = min(width, height * ratio), min(height, width / ratio)
    left, top = (width - across) / 2, (height - down) / 2
    return left, top, left + across, top + down


def _resized(image: Image, crop: tuple[float, float, float, float], size: tuple[int, int]) -> Pixels:
    import numpy as np
    from PIL import Image

    return np.asarray(image.resize(size, Image.Resampling.LANCZOS, box=crop))
