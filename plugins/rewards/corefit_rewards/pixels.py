"""Pictures as readers outside of torch take them: arrays of bytes, and files in memory."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


def pixels(pictures: Tensor) -> Any:
    """Return pictures [B, 3, H, W] in [0, 1] as a numpy array [B, H, W, 3] of bytes, rounded to the nearest."""
    import torch

    whole = (pictures.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)
    return whole.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def encoded(picture: Any, form: Literal["png", "jpeg"], quality: int = 95) -> bytes:
    """Return the bytes of a PNG or JPEG file of an array [H, W, 3] of bytes; `quality` is that of JPEG."""
    from PIL import Image

    file = io.BytesIO()
    options = {"quality": quality} if form == "jpeg" else {}
    Image.fromarray(picture).save(file, form, **options)
    return file.getvalue()
