"""Latents as a sequence of 2 x 2 patches, the input of FLUX and the models made from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def number(shape: Sequence[int]) -> int:
    """Number of patches of latents of `shape` [..., H, W]."""
    return (shape[-2] // 2) * (shape[-1] // 2)


def pack(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H W / 4, 4 C], one 2 x 2 patch per token."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def unpack(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """The inverse of `pack`; `size` is (H, W)."""
    b, _, c = tokens.shape
    h, w = size
    return tokens.reshape(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, h, w)


def positions(x: Tensor) -> Tensor:
    """(0, row, column) of each patch of x [B, C, H, W], as the network's position embedding takes it: [H W / 4, 3]."""
    import torch

    rows, columns = (torch.arange(n // 2, device=x.device, dtype=torch.float32) for n in x.shape[-2:])
    grid = torch.stack(torch.meshgrid(torch.zeros(1, device=x.device), rows, columns, indexing="ij"), dim=-1)
    return grid.reshape(-1, 3)
