"""Writes a small FLUX.1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corefit.testing.checkpoints.text import (
    CLIP_END,
    clip_pieces,
    clip_text_encoder,
    clip_tokenizer,
    t5_encoder,
    t5_pieces,
    t5_tokenizer,
)
from corefit.testing.checkpoints.vae import image_vae


def tiny_flux(
    folder: Path,
    *,
    words: Sequence[str],
    seed: int = 0,
    layers: int = 1,
    single_layers: int = 1,
    heads: int = 2,
    head_width: int = 16,
    latent_channels: int = 4,
    vae_widths: Sequence[int] = (8, 16),
    clip_width: int = 16,
    clip_length: int = 16,
    t5_width: int = 32,
    guidance_embeds: bool = True,
) -> Path:
    """Write what `FluxPipeline.from_pretrained(folder)` loads, with random weights.

    words            each becomes one token of both text encoders; other text is split into characters
    vae_widths       channels of each level; the spatial factor is 2 ** (levels - 1)
    guidance_embeds  True like FLUX.1-dev, whose network takes the guidance scale as an input; False like
                     FLUX.1-schnell, which has a constant shift of 1
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    folder, clip_vocabulary, t5_vocabulary = Path(folder), clip_pieces(words), t5_pieces(words)
    dynamic: dict[str, Any] = {"shift": 3.0, "use_dynamic_shifting": True} if guidance_embeds else {"shift": 1.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = FluxPipeline(
            transformer=_transformer(
                layers, single_layers, heads, head_width, latent_channels, t5_width, clip_width, guidance_embeds
            ),
            vae=image_vae(latent_channels, vae_widths, 1, 8, 0.3611, 0.1159),
            text_encoder=clip_text_encoder(clip_vocabulary, clip_width, 2, clip_length),
            text_encoder_2=t5_encoder(t5_vocabulary, t5_width, 1),
            tokenizer=clip_tokenizer(folder / "tokenizer", clip_vocabulary, clip_length, CLIP_END),
            tokenizer_2=t5_tokenizer(t5_vocabulary),
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, **dynamic),
        )
    pipeline.save_pretrained(folder)
    return folder


def _transformer(
    layers: int, single: int, heads: int, width: int, channels: int, text: int, pooled: int, guidance: bool
) -> Any:
    from diffusers import FluxTransformer2DModel

    thirds = width // 8 * 2
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * channels,
        num_layers=layers,
        num_single_layers=single,
        attention_head_dim=width,
        num_attention_heads=heads,
        joint_attention_dim=text,
        pooled_projection_dim=pooled,
        guidance_embeds=guidance,
        axes_dims_rope=(width - 2 * thirds, thirds, thirds),
    ).eval()
