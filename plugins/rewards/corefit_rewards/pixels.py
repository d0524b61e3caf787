"""Pictures as readers outside of torch take them: arrays of bytes, and files in memory."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


def pixels(pictures: Tensor) -> Any:
    """Return pictures [B, 3, H, W] in [0, 1] as a numpy array [B, H, W, 3] of bytes, rounded to the nearest."""
    return whole(pictures).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def whole(pictures: Tensor) -> Tensor:
    """Return pictures in [0, 1] as bytes, rounded to the nearest, in the same layout and on the same device."""
    import torch

    return (pictures.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)


def scored(pictures: Tensor, read: Callable[[list[int]], Sequence[float]]) -> Tensor:
    """Return scores [B] in float32 of pictures [B, 3, H, W], which `read` gives for the numbers of the rows.

    Pictures with numbers that are not finite, which bytes cannot show, are not read. Their score is NaN, which stops
    the stage.
    """
    import torch

    rows: list[int] = pictures.detach().flatten(1).isfinite().all(1).nonzero().flatten().tolist()
    scores = torch.full((len(pictures),), torch.nan)
    if rows:
        scores[rows] = torch.tensor(read(rows), dtype=torch.float32)
    return scores


def encoded(picture: Any, form: Literal["png", "jpeg"], quality: int = 95) -> bytes:
    """Return the bytes of a PNG or JPEG file of an array [H, W, 3] of bytes; `quality` is that of JPEG."""
    from PIL import Image

    file = io.BytesIO()
    options = {"quality": quality} if form == "jpeg" else {}
    Image.fromarray(picture).save(file, form, **options)
    return file.getvalue()
