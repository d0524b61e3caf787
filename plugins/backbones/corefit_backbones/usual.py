"""How a family is usually sampled: the defaults of its pipeline in diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from corefit_backbones.folder import Checkpoint

NAMES: Mapping[str, str] = {"guidance_scale": "guidance", "num_inference_steps": "steps"}
"""The names of diffusers' arguments, and those of corefit's keys."""
LATENTS = 128
"""Latents on a side that diffusers' pictures have where the network's config does not say."""


def of(pipeline: Any, checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return guidance, steps and size: the defaults of `pipeline`, and for pictures the size of the checkpoint."""
    taken = signature(pipeline.__call__).parameters
    found = {ours: taken[theirs].default for theirs, ours in NAMES.items()}
    if taken["height"].default is not None:
        sides = [taken[name].default for name in ("num_frames", "height", "width") if name in taken]
        return {**found, "size": sides}
    network, vae = checkpoint.config("transformer"), checkpoint.config("vae")
    pixels = 2 ** (len(vae["block_out_channels"]) - 1)
    return {**found, "size": [network.get("sample_size", LATENTS) * pixels] * 2}
