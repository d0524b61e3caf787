"""What the weights of a saved LoRA are called, since other programs find them by name alone.

ComfyUI (comfy/lora.py, model_lora_keys_unet) gives SD3, FLUX and Chroma, a kind of FLUX to it, the names of diffusers'
modules after "transformer.", and reads `<name>.lora_A.weight` and `<name>.lora_B.weight`. Of other models, Wan among
them, it takes "diffusion_model." and a module of the authors' code.
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

from corefit.testing import tiny_chroma, tiny_flux, tiny_sd3, tiny_wan
from corefit_backbones.chroma import Chroma
from corefit_backbones.flux import Flux
from corefit_backbones.sd3 import Sd3
from corefit_backbones.wan import Wan

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


# Wan

AUTHORS = {f"blocks.{n}.{kind}_attn.{one}" for n in (0, 1) for kind in ("self", "cross") for one in "qkvo"}
EVERY = (
    *(*IMAGE, "ffn.net.0.proj", "ffn.net.2", "proj_out", "condition_embedder.time_proj"),
    *(f"condition_embedder.{what}_embedder.linear_{n}" for what in ("text", "time") for n in (1, 2)),
)
EVERY_ONE = {
    *(*AUTHORS, "head.head", "time_projection.1"),
    *(f"blocks.{n}.ffn.{layer}" for n in (0, 1) for layer in (0, 2)),
    *(f"{what}_embedding.{layer}" for what in ("text", "time") for layer in (0, 2)),
}


def adapted_wan(folder: Path, targets: list[str] | None = None, experts: int = 1) -> Wan:
    """With weights that are all different, and alpha not the rank."""
    backbone = Wan(str(tiny_wan(folder / "base", words=WORDS, layers=2, experts=experts)))
    backbone.load(torch.device("cpu"), torch.float32)
    config = LoraConfig(r=2, lora_alpha=7, target_modules=targets or list(backbone.lora_targets))
    backbone.transformer.add_adapter(config)
    draws = torch.Generator().manual_seed(0)
    for name, p in backbone.transformer.named_parameters():
        p.requires_grad_(".lora_" in name)
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=draws)
    return backbone


def adapter(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name.replace("default_0", "default"): p for name, p in transformer.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize(("targets", "modules"), [(None, AUTHORS), (list(EVERY), EVERY_ONE)], ids=["default", "every"])
@pytest.mark.parametrize("experts", [1, 2])
def test_wan_has_its_authors_names_and_loads_in_diffusers(
    targets: list[str] | None, modules: set[str], experts: int, tmp_path: Path
) -> None:
    from diffusers import WanPipeline

    backbone = adapted_wan(tmp_path, targets, experts)
    backbone.save(tmp_path / "lora")
    pipe: Any = WanPipeline.from_pretrained(tmp_path / "base")
    for part, network in backbone._parts():
        file = FILE if part == "transformer" else FILE.replace(".", f".{part}.", 1)
        names = load_file(tmp_path / "lora" / file).keys()
        assert names == {f"diffusion_model.{module}.lora_{half}.weight" for module in modules for half in "AB"}
        pipe.load_lora_weights(tmp_path / "lora", weight_name=file, load_into_transformer_2=part != "transformer")
        theirs = getattr(pipe, part)
        assert {c.lora_alpha for c in theirs.peft_config.values()} == {7}
        found, expected = adapter(theirs), adapter(network)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("targets", [["patch_embedding", "to_q"], ["proj_out"]])
def test_names_that_diffusers_would_not_take_back_are_not_given(targets: list[str], tmp_path: Path) -> None:
    backbone = adapted_wan(tmp_path, targets)
    backbone.save(tmp_path / "lora")
    assert all(name.startswith("transformer.") for name in load_file(tmp_path / "lora" / FILE))
    again = Wan(backbone.path)
    again.load(torch.device("cpu"), torch.float32)
    again.load_lora(tmp_path / "lora")
    found, expected = adapter(again.transformer), adapter(backbone.transformer)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
