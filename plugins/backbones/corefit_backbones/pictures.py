"""Latents of image VAEs: the mode of the VAE's distribution, shifted and scaled as its config says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from corefit.errors import ModelError
from corefit_backbones.folder import Checkpoint, Settings

if TYPE_CHECKING:
    from torch import Tensor


def check(checkpoint: Checkpoint) -> None:
    """Raise a ModelError if latents cannot be shifted, scaled and restored with the VAE's config."""
    vae = checkpoint.config("vae")
    _ = vae["shift_factor"]
    if not vae["scaling_factor"]:
        raise ModelError(f"{vae.file}: scaling_factor is {vae['scaling_factor']}; latents are divided by it")


def check_tile(config: Settings, side: int) -> None:
    """Raise a ModelError unless tiles of `side` pixels, and the quarter in which they overlap, are whole latents."""
    refuse_tile(side, 2 ** (len(config["block_out_channels"]) - 1))


def refuse_tile(side: int, scale: int) -> None:
    """Raise a ModelError unless a quarter of `side` pixels is a number of latents of `scale` pixels each."""
    if side % (4 * scale):
        raise ModelError(
            f"tile = {side}: must be a multiple of {4 * scale}, so that the quarter in which tiles overlap is whole "
            f"latents; nearest: {max(1, round(side / (4 * scale))) * 4 * scale}"
        )


def tile(vae: Any, side: int) -> None:
    """Let the VAE encode and decode pictures larger than `side` pixels in tiles, which overlap by a quarter."""
    vae.enable_tiling()
    vae.tile_sample_min_size = side
    vae.tile_latent_min_size = side // 2 ** (len(vae.config.block_out_channels) - 1)


def encode(vae: Any, media: Tensor) -> Tensor:
    """Media [B, 3, H, W] in [0, 1] -> x0 [B, C, h, w], float32."""
    z = vae.encode(media.to(vae.device, vae.dtype) * 2 - 1).latent_dist.mode()
    return (z - vae.config.shift_factor) * vae.config.scaling_factor


def decode(vae: Any, x0: Tensor) -> Tensor:
    """x0 [B, C, h, w] -> media [B, 3, H, W] in [0, 1], float32; differentiable in x0."""
    z = x0.to(vae.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    return (vae.decode(z).sample / 2 + 0.5).clamp(0, 1)
