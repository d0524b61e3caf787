"""Pictures as a decoder gives them: upright, in RGB, 8 bits a channel."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corefit.types import ArchiveMember

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
ORIENTATION = 0x0112
"""The EXIF tag; values from 5 on exchange width and height."""
LATE = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
"""Chunks of a PNG that may hold EXIF or XMP."""


def upright(media: Path | ArchiveMember | Any) -> Image:
    """A picture in RGB, turned as its EXIF says, transparency over white, 16-bit grey scaled.

    Raises whatever the decoder finds wrong, ValueError for pixels without an agreed range or of another layout.
    """
    from PIL import Image, ImageOps

    if not isinstance(media, (Path, ArchiveMember)):
        return in_memory(media)
    with Image.open(opened(media)) as image:
        return _rgb(ImageOps.exif_transpose(image))


def in_memory(media: Any) -> Image:
    """An array uint8 [H, W, 3] as a picture; ValueError for another."""
    import numpy as np
    from PIL import Image

    array = np.asarray(media)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"an image in memory is {array.dtype} {array.shape}, expected uint8 [H, W, 3]")
    return Image.fromarray(np.ascontiguousarray(array))


def dimensions(media: Path | ArchiveMember) -> tuple[int, int]:
    """Height and width, upright; pixels are not decoded."""
    from PIL import Image

    with Image.open(opened(media)) as image:
        exif = image.getexif() if _exif_is_late(image) else Image.Image.getexif(image)
        return (image.width, image.height) if exif.get(ORIENTATION, 1) >= 5 else (image.height, image.width)


def opened(media: Path | ArchiveMember) -> Any:
    """What a decoder opens."""
    return media if isinstance(media, Path) else io.BytesIO(media.read())


def _exif_is_late(image: Any) -> bool:
    """Whether a PNG may hold EXIF behind its pixels; Pillow decodes them to look there, unless it is told not to."""
    if image.format != "PNG":
        return False
    file = image.fp
    place, behind = file.tell(), False
    file.seek(8)
    while len(head := file.read(8)) == 8:
        behind = behind or head[4:] == b"IDAT"
        if behind and head[4:] in LATE:
            break
        file.seek(int.from_bytes(head[:4], "big") + 4, io.SEEK_CUR)
    file.seek(place)
    return len(head) == 8


def _rgb(image: Image) -> Image:
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
