"""Decode pictures to upright RGB images with 8 bits per channel."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corefit.types import ArchiveMember

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
ORIENTATION = 0x0112
"""The EXIF tag of the orientation; values of 5 and more exchange width and height."""
EXIF_CHUNKS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
"""Types of PNG chunks that may hold EXIF or XMP."""


def upright(media: Path | ArchiveMember | Any) -> Image:
    """Return a picture in RGB: turned as its EXIF says, transparency over white, 16-bit gray scaled to 8 bits.

    Raises what the decoder raises; ValueError for pixels without an agreed range, or an array of another layout.
    """
    from PIL import Image, ImageOps

    if not isinstance(media, (Path, ArchiveMember)):
        return in_memory(media)
    with Image.open(decoder_input(media)) as image:
        return _to_rgb(ImageOps.exif_transpose(image))


def in_memory(media: Any) -> Image:
    """Return an array uint8 [H, W, 3] as a picture; ValueError for any other array."""
    import numpy as np
    from PIL import Image

    array = np.asarray(media)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"an image in memory is {array.dtype} {array.shape}, expected uint8 [H, W, 3]")
    return Image.fromarray(np.ascontiguousarray(array))


def dimensions(media: Path | ArchiveMember) -> tuple[int, int]:
    """Return the upright height and width; pixels are not decoded."""
    from PIL import Image

    with Image.open(decoder_input(media)) as image:
        exif = image.getexif() if _exif_is_late(image) else Image.Image.getexif(image)
        return (image.width, image.height) if exif.get(ORIENTATION, 1) >= 5 else (image.height, image.width)


def decoder_input(media: Path | ArchiveMember) -> Any:
    """Return what a decoder can open: the path of a file, or the bytes of an archive member as a file object."""
    return media if isinstance(media, Path) else io.BytesIO(media.read())


def _exif_is_late(image: Any) -> bool:
    """Return whether a PNG may hold EXIF after its pixels; to look there, Pillow has to decode the pixels."""
    if image.format != "PNG":
        return False
    file = image.fp
    position, after_pixels = file.tell(), False
    file.seek(8)
    while len(head := file.read(8)) == 8:
        after_pixels = after_pixels or head[4:] == b"IDAT"
        if after_pixels and head[4:] in EXIF_CHUNKS:
            break
        file.seek(int.from_bytes(head[:4], "big") + 4, io.SEEK_CUR)
    file.seek(position)
    return len(head) == 8


def _to_rgb(image: Image) -> Image:
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
    """Scale 16-bit gray, which may be in Pillow's 32-bit mode, to 8 bits; convert() would clip it to white."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit gray pixels have no agreed range; save 8 or 16 bits a channel")
    return Image.fromarray((values / 257).round().astype(np.uint8))
