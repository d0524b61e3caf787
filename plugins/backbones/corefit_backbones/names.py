"""Names of a LoRA's weights as the authors of a model have them, which programs other than diffusers look for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")
WAN = {
    r"blocks\.(\d+)\.attn1\.to_([qkv])": r"blocks.\1.self_attn.\2",
    r"blocks\.(\d+)\.attn1\.to_out\.0": r"blocks.\1.self_attn.o",
    r"blocks\.(\d+)\.attn2\.to_([qkv])": r"blocks.\1.cross_attn.\2",
    r"blocks\.(\d+)\.attn2\.to_out\.0": r"blocks.\1.cross_attn.o",
    r"blocks\.(\d+)\.ffn\.net\.0\.proj": r"blocks.\1.ffn.0",
    r"blocks\.(\d+)\.ffn\.net\.2": r"blocks.\1.ffn.2",
    r"condition_embedder\.time_proj": "time_projection.1",
    r"condition_embedder\.(text|time)_embedder\.linear_1": r"\1_embedding.0",
    r"condition_embedder\.(text|time)_embedder\.linear_2": r"\1_embedding.2",
    r"proj_out": "head.head",
}
"""Modules in diffusers -> in the authors' code; what `WanPipeline.lora_state_dict` takes back."""


def wan(weights: Mapping[str, T]) -> dict[str, T]:
    """ "transformer.blocks.0.attn1.to_q.lora_A.weight" -> "diffusion_model.blocks.0.self_attn.q.lora_A.weight".

    All or none: diffusers reads a file with one kind of names, and only with a block among them.
    """
    named = {_wan(name): weight for name, weight in weights.items()}
    if None in named or not any(".blocks." in str(name) for name in named):
        return dict(weights)
    return {str(name): weight for name, weight in named.items()}


def _wan(name: str) -> str | None:
    module, dot, half = name.removeprefix("transformer.").partition(".lora_")
    for theirs, authors in WAN.items():
        if re.fullmatch(theirs, module):
            return f"diffusion_model.{re.sub(theirs, authors, module)}{dot}{half}"
    return None
