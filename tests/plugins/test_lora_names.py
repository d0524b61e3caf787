"""What the weights of a saved LoRA are called, since other programs find them by name alone.

ComfyUI (comfy/lora.py, model_lora_keys_unet) gives SD3, FLUX and Chroma, a kind of FLUX to it, the names of diffusers'
modules after "transformer.", and reads `<name>.lora_A.weight` and `<name>.lora_B.weight`. It has no such names for Wan.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import frozen
from peft import LoraConfig
from safetensors.torch import load_file

from corefit.testing import tiny_chroma, tiny_flux, tiny_sd3
from corefit_backbones.chroma import Chroma
from corefit_backbones.flux import Flux
from corefit_backbones.sd3 import Sd3

WORDS = ("a", "red", "dog")
FILE = "pytorch_lora_weights.safetensors"
IMAGE, TEXT = ("to_q", "to_k", "to_v", "to_out.0"), ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
JOINT = {f"transformer_blocks.0.attn.{name}" for name in (*IMAGE, *TEXT)}
SINGLE = {f"single_transformer_blocks.0.attn.{name}" for name in IMAGE[:3]}
SECOND = {f"transformer_blocks.0.attn2.{name}" for name in IMAGE}


@frozen
class Case:
    """A family, and the modules of its first blocks that ComfyUI knows and a LoRA adapts by default."""

    kind: type[Any]
    make: Callable[..., Path]
    keys: dict[str, Any]
    modules: set[str]


CASES = {
    "sd3": Case(Sd3, tiny_sd3, {"layers": 2}, JOINT),
    "sd3.5-medium": Case(Sd3, tiny_sd3, {"layers": 2, "dual_attention_layers": (0,)}, JOINT | SECOND),
    "flux": Case(Flux, tiny_flux, {}, JOINT | SINGLE),
    "chroma": Case(Chroma, tiny_chroma, {}, JOINT | SINGLE),
}


def saved(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """The file of a LoRA of rank 2 on the default targets."""
    case = CASES[name]
    backbone = case.kind(str(case.make(folder / "base", words=WORDS, **case.keys)))
    backbone.load(torch.device("cpu"), torch.float32)
    backbone.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=list(backbone.lora_targets)))
    backbone.save(folder / "lora")
    return load_file(folder / "lora" / FILE)


@pytest.mark.parametrize("name", CASES)
def test_they_are_those_that_comfyui_maps(name: str, tmp_path: Path) -> None:
    first = {key for key in saved(name, tmp_path) if "blocks.0." in key}
    assert first == {f"transformer.{module}.lora_{half}.weight" for module in CASES[name].modules for half in "AB"}


def test_later_blocks_differ_in_their_number_alone(tmp_path: Path) -> None:
    """But for the last of SD3, which has no text behind it and so does not project it."""
    keys = saved("sd3", tmp_path)
    numbered = [{re.sub(r"\.\d+\.", ".", key, count=1) for key in keys if f"blocks.{n}." in key} for n in (0, 1)]
    assert {key.split(".lora_")[0] for key in numbered[0] - numbered[1]} == {
        "transformer.transformer_blocks.attn.to_add_out"
    }
    assert numbered[1] < numbered[0]


@pytest.mark.parametrize("name", ["flux", "chroma"])
def test_diffusers_gives_the_same_names_to_a_file_with_the_authors_own(name: str, tmp_path: Path) -> None:
    """Such a file (kohya's) has the names of Black Forest Labs, query, key and value in one; diffusers converts it."""
    from diffusers import FluxPipeline

    width = 3072  # of the real one, which the converter counts on
    shapes = {
        "double_blocks_0_img_attn_qkv": 3 * width,
        "double_blocks_0_txt_attn_qkv": 3 * width,
        "double_blocks_0_img_attn_proj": width,
        "double_blocks_0_txt_attn_proj": width,
        "single_blocks_0_linear1": 7 * width,
    }
    file = {f"lora_unet_{key}.lora_down.weight": torch.zeros(2, width) for key in shapes}
    file |= {f"lora_unet_{key}.lora_up.weight": torch.zeros(rows, 2) for key, rows in shapes.items()}
    file |= {f"lora_unet_{key}.alpha": torch.tensor(2.0) for key in shapes}
    converted: Any = FluxPipeline.lora_state_dict(file)
    assert converted.keys() - saved(name, tmp_path).keys() == {
        f"transformer.single_transformer_blocks.0.proj_mlp.lora_{half}.weight" for half in "AB"
    }
    assert saved(name, tmp_path / "again").keys() < converted.keys()
