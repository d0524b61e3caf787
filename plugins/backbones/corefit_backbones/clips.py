"""Latents of video VAEs: the mode of the VAE's distribution, normalized by mean and standard deviation per channel.

A single frame is an image: its media are [B, 3, H, W], and the VAE gets a clip of length 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from corefit.errors import ConfigError
from corefit_backbones import pictures
from corefit_backbones.folder import Settings

if TYPE_CHECKING:
    from torch import Tensor


def latents(size: Sequence[int], every: int) -> int:
    """Number of latents along time for [frames, height, width]: one for the first frame, and one per `every` others.

    For [height, width] it is 1. ConfigError for a size of another length, and for frames that would be cut off.
    """
    if len(size) not in (2, 3):
        raise ConfigError(
            f"size = {list(size)}: it is [frames, height, width] of clips, or [height, width] of pictures"
        )
    frames = size[0] if len(size) == 3 else 1
    if frames < 1 or (frames - 1) % every:
        near = sorted({max(0, n) * every + 1 for n in ((frames - 1) // every, -(-(frames - 1) // every))})
        raise ConfigError(
            f"size = {list(size)}: the number of frames must be a multiple of {every} and one more; nearest: "
            f"{' or '.join(map(str, near))}"
        )
    return (frames - 1) // every + 1


def check_tile(config: Settings, side: int) -> None:
    """Raise a ModelError as `pictures.check_tile` does."""
    pictures.refuse_tile(side, config.get("scale_factor_spatial", 8))


def tile(vae: Any, side: int) -> None:
    """Let the VAE encode and decode frames larger than `side` pixels in tiles, which overlap by a quarter."""
    vae.enable_tiling(side, side, 3 * side // 4, 3 * side // 4)


def encode(vae: Any, media: Tensor) -> Tensor:
    """Media [B, 3, H, W] or [B, 3, T, H, W] in [0, 1] -> x0 [B, C, t, h, w], float32."""
    clips = (media if media.ndim == 5 else media.unsqueeze(2)).to(vae.device, vae.dtype)
    mean, std = _statistics(vae)
    return (vae.encode(clips * 2 - 1).latent_dist.mode() - mean) / std


def decode(vae: Any, x0: Tensor) -> Tensor:
    """x0 [B, C, t, h, w] -> media [B, 3, T, H, W], or [B, 3, H, W] where T is 1, in [0, 1], float32."""
    mean, std = _statistics(vae)
    clips = (vae.decode(x0.to(vae.device, vae.dtype) * std + mean).sample / 2 + 0.5).clamp(0, 1)
    return clips.squeeze(2) if clips.shape[2] == 1 else clips


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    import torch

    config = vae.config
    both = torch.tensor([config.latents_mean, config.latents_std], device=vae.device, dtype=vae.dtype)
    mean, std = both.reshape(2, 1, -1, 1, 1, 1)
    return mean, std
