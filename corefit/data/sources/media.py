"""How media are read: upright, scaled and cropped to a size, as pixels."""

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
    """What is left of an example's media.

    pixels    uint8 [height, width, 3], of clips [frames, height, width, 3]
    enlarged  whether a side was smaller than it is now
    source    (height, width) before, upright
    crop      (left, top, right, bottom) of what was kept, in pixels of the source
    """

    pixels: Pixels
    enlarged: bool
    source: tuple[int, int]
    crop: tuple[float, float, float, float]


def view(media: Path | ArchiveMember | Any, size: Sequence[int], fps: float | None = None) -> View:
    """Media as pixels of `size`, [height, width] for pictures or [frames, height, width] for clips.

    Upright (EXIF), transparency over white, 16-bit grey scaled; the shortest side is resized (Lanczos, antialiased)
    and the centre is kept. A clip's frames are those at `fps` from its beginning, or its own. Raises whatever the
    decoder finds wrong, ValueError for a clip that is too short, a picture where a clip is wanted, or the reverse.
    """
    import numpy as np

    *frames, height, width = size
    images = video.frames(_moving(media), frames[0], fps) if frames else iter([_still(media)])
    first = next(images)
    crop = _crop(first.width, first.height, width / height)
    fitted = [_fitted(image, crop, (width, height)) for image in chain([first], _alike(images, first.size))]
    enlarged = first.width < width or first.height < height
    return View(np.stack(fitted) if frames else fitted[0], enlarged, (first.height, first.width), crop)


def dimensions(media: Path | ArchiveMember | Any) -> tuple[int, int]:
    """Height and width, upright, without decoding a picture's pixels or more than a clip's first frame."""
    import numpy as np

    if not isinstance(media, (Path, ArchiveMember)):
        height, width = np.asarray(media).shape[-3:-1]
        return int(height), int(width)
    return video.dimensions(media) if video.moves(media) else pictures.dimensions(media)


def _still(media: Path | ArchiveMember | Any) -> Image:
    if video.moves(media):
        raise ValueError("this is a clip, and size = [height, width] is of pictures; give [frames, height, width]")
    return pictures.upright(media)


def _moving(media: Path | ArchiveMember | Any) -> Any:
    if not video.moves(media):
        raise ValueError("this is a picture, and size = [frames, height, width] is of clips; give [height, width]")
    return media


def _alike(images: Iterator[Image], size: tuple[int, int]) -> Iterator[Image]:
    for number, image in enumerate(images, 2):
        if image.size != size:
            raise ValueError(
                f"frame {number} has {image.width} x {image.height} pixels, the first {size[0]} x {size[1]}; "
                "those of a clip have one size"
            )
        yield image


def _crop(width: int, height: int, ratio: float) -> tuple[float, float, float, float]:
    """The largest box of an aspect in the middle."""
    across, down = min(width, height * ratio), min(height, width / ratio)
    left, top = (width - across) / 2, (height - down) / 2
    return left, top, left + across, top + down


def _fitted(image: Image, crop: tuple[float, float, float, float], size: tuple[int, int]) -> Pixels:
    import numpy as np
    from PIL import Image

    return np.asarray(image.resize(size, Image.Resampling.LANCZOS, box=crop))
