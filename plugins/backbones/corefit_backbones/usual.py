"""The size of media that a checkpoint was made for."""

from __future__ import annotations

from collections.abc import Sequence

from corefit_backbones.folder import Checkpoint


def size(checkpoint: Checkpoint, suggested: Sequence[int]) -> tuple[int, ...]:
    """Return the size that the network's config names in latents, or `suggested` where it names none, as for clips."""
    latents = checkpoint.config("transformer").get("sample_size")
    if latents is None or len(suggested) > 2:
        return tuple(suggested)
    pixels = 2 ** (len(checkpoint.config("vae")["block_out_channels"]) - 1)
    return (latents * pixels,) * 2
