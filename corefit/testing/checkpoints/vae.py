"""Makes the image VAE of small checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def image_vae(channels: int, widths: Sequence[int], layers: int, latent_size: int, scaling: float, shift: float) -> Any:
    """Make a random AutoencoderKL with the given scaling and shift factors."""
    from diffusers import AutoencoderKL

    kind: Any = AutoencoderKL  # its annotations allow one block, and checkpoints have several
    return kind(
        block_out_channels=tuple(widths),
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=layers,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=latent_size * 2 ** (len(widths) - 1),
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
