"""Names of a LoRA's weights in the original code of a model, which programs other than diffusers expect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from corefit.errors import ModelError
from corefit_backbones import original_names

T = TypeVar("T")
UNREAD = frozenset({"patch_embedding"})
"""Modules that `WanPipeline.lora_state_dict` does not convert back."""


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
    try:
        original = original_names.module_name(module, original_names.wan(0))
    except ModelError:
        return None
    return f"diffusion_model.{original}{dot}{half}" if original not in UNREAD else None
