"""Writes a small Chroma."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from corefit.testing.checkpoints.text import t5_encoder, t5_pieces, t5_tokenizer
from corefit.testing.checkpoints.vae import image_vae


def tiny_chroma(
    folder: Path,
    *,
    words: Sequence[str],
    seed: int = 0,
    heads: int = 2,
    head_width: int = 16,
    latent_channels: int = 4,
    vae_widths: Sequence[int] = (8, 16),
    t5_width: int = 32,
) -> Path:
    """Write what `ChromaPipeline.from_pretrained(folder)` loads, with random weights.

    words       each becomes one token of the text encoder; other text is split into characters
    vae_widths  channels of each level; the spatial factor is 2 ** (levels - 1)
    """
    import torch
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    folder, vocabulary, thirds = Path(folder), t5_pieces(words), head_width // 8 * 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = ChromaPipeline(
            transformer=ChromaTransformer2DModel(
                in_channels=4 * latent_channels,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=head_width,
                num_attention_heads=heads,
                joint_attention_dim=t5_width,
                axes_dims_rope=(head_width - 2 * thirds, thirds, thirds),
                approximator_num_channels=16,
                approximator_hidden_dim=32,
                approximator_layers=1,
            ).eval(),
            vae=image_vae(latent_channels, vae_widths, 1, 8, 0.3611, 0.1159),
            text_encoder=t5_encoder(vocabulary, t5_width, 1),
            tokenizer=t5_tokenizer(vocabulary),
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True),
        )
    pipeline.save_pretrained(folder)
    return folder
