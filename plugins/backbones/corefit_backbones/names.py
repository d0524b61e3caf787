"""Names of a LoRA's weights in the original code of a model, which programs other than diffusers expect."""

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
"""Modules in diffusers -> in Wan's original code; `WanPipeline.lora_state_dict` converts them back."""


def wan(weights: Mapping[str, T]) -> dict[str, T]:
    """ "transformer.blocks.0.attn1.to_q.lora_A.weight" -> "diffusion_model.blocks.0.self_attn.q.lora_A.weight".

    Either all names are converted or none, because diffusers does not read a file with both kinds of names. It also
    needs at least one block to recognize the original names.
    """
    named = {_wan(name): weight for name, weight in weights.items()}
    if None in named or not any(".blocks." in str(name) for name in named):
        return dict(weights)
    return {str(name): weight for name, weight in named.items()}


def _wan(name: str) -> str | None:
    module, dot, half = name.removeprefix("transformer.").partition(".lora_")
    for diffusers, original in WAN.items():
        if re.fullmatch(diffusers, module):
            return f"diffusion_model.{re.sub(diffusers, original, module)}{dot}{half}"
    return None
