"""Writes a small Wan with one network or two experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corefit.testing.checkpoints.text import t5_encoder, t5_pieces, t5_tokenizer

MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508)
STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743)
"""The statistics of the leading channels of the real VAE's latents."""


def tiny_wan(
    folder: Path,
    *,
    words: Sequence[str],
    seed: int = 0,
    experts: int = 1,
    layers: int = 2,
    heads: int = 2,
    head_width: int = 12,
    latent_channels: int = 4,
    t5_width: int = 32,
    shift: float = 3.0,
    boundary: float = 0.875,
    expand_timesteps: bool = False,
    packed_vae: bool = False,
) -> Path:
    """Write what `WanPipeline.from_pretrained(folder)` loads, with random weights.

    words             each becomes one token of the text encoder; other text is split into characters
    experts           2 also writes transformer_2, like Wan 2.2 A14B; it is used at noise levels below `boundary`
    shift             shift of the scheduler, which is UniPC, as in the real folders
    expand_timesteps  True like Wan 2.2 5B, whose network takes a timestep for each patch (equal in text-to-video)
    packed_vae        True like Wan 2.2 5B, whose VAE packs 2 x 2 pixels into one, so that a latent is 16 pixels wide
                      instead of 8
    """
    import torch
    from diffusers import UniPCMultistepScheduler, WanPipeline

    vocabulary = t5_pieces(words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = [_transformer(layers, heads, head_width, latent_channels, t5_width) for _ in range(experts)]
        kind: Any = WanPipeline  # its annotations name another scheduler than its folders have
        pipeline = kind(
            tokenizer=t5_tokenizer(vocabulary),
            text_encoder=t5_encoder(vocabulary, t5_width, 1, per_layer=True),
            vae=_vae(latent_channels, packed_vae),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
            ),
            transformer=networks[0],
            transformer_2=networks[1] if experts > 1 else None,
            boundary_ratio=boundary if experts > 1 else None,
            expand_timesteps=expand_timesteps,
        )
    pipeline.save_pretrained(folder)
    return folder


def _vae(channels: int, packed: bool) -> Any:
    from diffusers import AutoencoderKLWan

    kind: Any = AutoencoderKLWan
    patches = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    return kind(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=list(MEAN[:channels]),
        latents_std=list(STD[:channels]),
        **(patches if packed else {}),
    ).eval()


def _transformer(layers: int, heads: int, width: int, channels: int, text: int) -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=width,
        in_channels=channels,
        out_channels=channels,
        text_dim=text,
        freq_dim=16,
        ffn_dim=2 * heads * width,
        num_layers=layers,
        rope_max_seq_len=64,
    ).eval()
