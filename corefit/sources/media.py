"""How media are read: upright, scaled and cropped to a size, as pixels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from corefit.sources import video
from corefit.types import Stored

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    Pixels = NDArray[np.uint8]

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
MEDIA = PICTURES | video.VIDEOS


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


def view(media: Path | Stored | Any, size: Sequence[int], fps: float | None = None) -> View:
    """Media as pixels of `size`, [height, width] for pictures or [frames, height, width] for clips.

    Upright (EXIF), transparency over white, 16-bit grey scaled; the shortest side is resized (Lanczos, antialiased)
    and the centre is kept. A clip's frames are those at `fps` from its beginning, or its own. Raises whatever the
    decoder finds wrong, ValueError for a clip that is too short, a picture where a clip is wanted, or the reverse.
    """
    import numpy as np

    *frames, height, width = size
    images = [rgb(image) for image in video.frames(_moving(media), frames[0], fps)] if frames else [_still(media)]
    first = images[0]
    crop = _crop(first.width, first.height, width / height)
    fitted = np.stack([_fitted(image, crop, (width, height)) for image in images])
    enlarged = first.width < width or first.height < height
    return View(fitted if frames else fitted[0], enlarged, (first.height, first.width), crop)


def dimensions(media: Path | Stored | Any) -> tuple[int, int]:
    """Height and width, upright, from a file's header."""
    import numpy as np
    from PIL import Image

    if not isinstance(media, (Path, Stored)):
        height, width = np.asarray(media).shape[-3:-1]
        return int(height), int(width)
    if video.moves(media):
        return video.dimensions(media)
    with Image.open(opened(media)) as image:
        turned = image.getexif().get(0x0112, 1) >= 5
        return (image.width, image.height) if turned else (image.height, image.width)


def opened(media: Path | Stored) -> Any:
    """What a decoder opens."""
    return media if isinstance(media, Path) else io.BytesIO(media.read())


def _still(media: Path | Stored | Any) -> Image:
    from PIL import Image, ImageOps

    if video.moves(media):
        raise ValueError("this is a clip, and size = [height, width] is of pictures; give [frames, height, width]")
    with Image.open(opened(media)) if isinstance(media, (Path, Stored)) else _in_memory(media) as image:
        return rgb(ImageOps.exif_transpose(image))


def _moving(media: Path | Stored | Any) -> Any:
    if not video.moves(media):
        raise ValueError("this is a picture, and size = [frames, height, width] is of clips; give [height, width]")
    return media


def _crop(width: int, height: int, ratio: float) -> tuple[float, float, float, float]:
    """The largest box of an aspect in the middle."""
    across, down = min(width, height * ratio), min(height, width / ratio)
    left, top = (width - across) / 2, (height - down) / 2
    return left, top, left + across, top + down


def _fitted(image: Image, crop: tuple[float, float, float, float], size: tuple[int, int]) -> Pixels:
    import numpy as np
    from PIL import Image

    return np.asarray(image.resize(size, Image.Resampling.LANCZOS, box=crop))


def _in_memory(media: Any) -> Image:
    import numpy as np
    from PIL import Image

    array = np.asarray(media)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"an image in memory is {array.dtype} {array.shape}, expected uint8 [H, W, 3]")
    return Image.fromarray(np.ascontiguousarray(array))


def rgb(image: Image) -> Image:
    from PIL import Image

    if image.mode.startswith("I"):
        return _eight_bit(image).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; save 8 or 16 bits a channel")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _eight_bit(image: Image) -> Image:
    """16-bit grey, also as Pillow's 32-bit mode, in 8 bits; plain conversion would clip it to white."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit grey pixels have no agreed range; save 8 or 16 bits a channel")
    return Image.fromarray((values / 257).round().astype(np.uint8))
