"""Writes a small Stable Diffusion 3."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corefit.testing.checkpoints.text import (
    CLIP_END,
    clip_encoder,
    clip_pieces,
    clip_tokenizer,
    t5_encoder,
    t5_pieces,
    t5_tokenizer,
)
from corefit.testing.checkpoints.vae import image_vae


def tiny_sd3(
    folder: Path,
    *,
    words: Sequence[str],
    seed: int = 0,
    layers: int = 2,
    heads: int = 2,
    head_width: int = 16,
    dual_attention_layers: Sequence[int] = (),
    patch: int = 2,
    latent_size: int = 8,
    max_latent_size: int = 32,
    latent_channels: int = 4,
    vae_widths: Sequence[int] = (8, 16),
    vae_layers: int = 1,
    scaling_factor: float = 1.5305,
    shift_factor: float = 0.0609,
    clip_widths: tuple[int, int] = (16, 16),
    clip_layers: int = 2,
    clip_length: int = 16,
    t5_width: int = 32,
    t5_layers: int = 1,
    shift: float = 3.0,
) -> Path:
    """Write what `StableDiffusion3Pipeline.from_pretrained(folder)` loads, with random weights.

    words            each becomes one token of every text encoder (but CLIP splits numbers into digits); other text is
                     split into characters
    latent_size      height and width of the pipeline's default image, in latent pixels
    max_latent_size  the largest height and width that the transformer accepts, in latent pixels
    vae_widths       channels of each level; the spatial factor is 2 ** (levels - 1)
    clip_length      tokens to which the pipeline pads both CLIP prompts, start and end included
    t5_width         width of T5 and of the transformer's joint attention; at least the sum of clip_widths
    shift            shift of the flow-matching scheduler
    """
    if t5_width < sum(clip_widths):
        raise ValueError(f"t5_width {t5_width} is less than the sum of clip_widths {tuple(clip_widths)}")
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    folder = Path(folder)
    clip_vocabulary = clip_pieces(words)
    t5_vocabulary = t5_pieces(words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusion3Pipeline(
            transformer=_transformer(
                layers,
                heads,
                head_width,
                tuple(dual_attention_layers),
                patch,
                (latent_size, max_latent_size, latent_channels),
                t5_width,
                sum(clip_widths),
            ),
            vae=image_vae(latent_channels, vae_widths, vae_layers, latent_size, scaling_factor, shift_factor),
            text_encoder=clip_encoder(clip_vocabulary, clip_widths[0], clip_layers, clip_length),
            text_encoder_2=clip_encoder(clip_vocabulary, clip_widths[1], clip_layers, clip_length),
            text_encoder_3=t5_encoder(t5_vocabulary, t5_width, t5_layers),
            tokenizer=clip_tokenizer(folder / "tokenizer", clip_vocabulary, clip_length, CLIP_END),
            tokenizer_2=clip_tokenizer(folder / "tokenizer_2", clip_vocabulary, clip_length, "!"),
            tokenizer_3=t5_tokenizer(t5_vocabulary),
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift),
        )
    pipeline.save_pretrained(folder)
    return folder


def _transformer(
    layers: int,
    heads: int,
    head_width: int,
    dual_attention_layers: tuple[int, ...],
    patch: int,
    latents: tuple[int, int, int],
    text_width: int,
    pooled_width: int,
) -> Any:
    from diffusers import SD3Transformer2DModel

    size, max_size, channels = latents
    return SD3Transformer2DModel(
        sample_size=size,
        patch_size=patch,
        in_channels=channels,
        out_channels=channels,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_width,
        joint_attention_dim=text_width,
        caption_projection_dim=heads * head_width,
        pooled_projection_dim=pooled_width,
        pos_embed_max_size=max_size // patch,
        dual_attention_layers=dual_attention_layers,
        qk_norm="rms_norm" if dual_attention_layers else None,
    ).eval()
