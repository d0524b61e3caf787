"""The checks that every backbone must pass, and tests of this one, on a tiny checkpoint with random weights."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from corefit.errors import ConfigError, ModelError
from corefit.testing import check_backbone, tiny_sd3
from corefit.types import Sized
from corefit_plugin_name import PluginName

WORDS = ("a", "red", "blue", "circle")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd3(tmp_path_factory.mktemp("model") / "base", words=WORDS)


@pytest.fixture
def backbone(folder: Path) -> PluginName:
    backbone = PluginName(folder, max_sequence_length=16)
    backbone.load(CPU, torch.float32)
    return backbone


def test_it_is_a_backbone(backbone: PluginName):
    check_backbone(backbone, prompts=["a red circle", "a blue circle"])


@torch.no_grad()
def test_it_samples_what_diffusers_samples(backbone: PluginName, folder: Path):
    from diffusers import StableDiffusion3Pipeline

    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    how = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent", "max_sequence_length": 16}
    theirs = pipeline("a red circle", height=16, width=16, latents=x, **how).images
    cond = backbone.encode_text(["a red circle"])
    for sigma, after in pairwise(backbone.sigmas(4, (4, 8, 8))):
        x = x + (after - sigma) * backbone.velocity(x, sigma[None], cond)
    torch.testing.assert_close(x, theirs, atol=1e-4, rtol=0)


def test_a_lora_is_saved_and_read_back(backbone: PluginName, folder: Path, tmp_path: Path):
    from diffusers import StableDiffusion3Pipeline
    from peft import LoraConfig

    x, sigma, cond = torch.ones(1, 4, 8, 8), torch.tensor([0.5]), backbone.encode_text(["a red circle"])
    backbone.transformer.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    expected = backbone.velocity(x, sigma, cond)
    backbone.save(tmp_path)
    again = PluginName(folder, max_sequence_length=16)
    again.load(CPU, torch.float32)
    again.load_lora(tmp_path)
    torch.testing.assert_close(again.velocity(x, sigma, cond), expected)
    assert {
        name for name, p in again.transformer.named_parameters() if p.requires_grad and "lora_" not in name
    } == set()

    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path)
    again.transformer = pipeline.transformer
    torch.testing.assert_close(again.velocity(x, sigma, cond), expected)


def test_its_need_of_memory_is_known_without_weights(backbone: PluginName, folder: Path):
    blank = PluginName(folder, max_sequence_length=16)
    assert isinstance(blank, Sized), "what `corefit check` asks"
    blank.load_blank(torch.bfloat16)
    shapes = {name: p.shape for name, p in backbone.transformer.named_parameters()}
    assert {name: p.shape for name, p in blank.transformer.named_parameters()} == shapes
    assert {(p.device.type, p.dtype) for p in blank.transformer.parameters()} == {("meta", torch.bfloat16)}
    cond = backbone.encode_text(["a red circle"])
    assert {name: tuple(t.shape[1:]) for name, t in cond.tensors.items()} == blank.condition_shapes()


def test_sizes_that_would_be_cropped_are_refused(folder: Path):
    assert PluginName(folder).latent_shape([16, 24]) == (4, 8, 12)
    for size in ([16, 18], [0, 16], [5, 16, 16], [16, 4096]):
        with pytest.raises(ConfigError, match="size = "):
            PluginName(folder).latent_shape(size)


def test_missing_weights_are_named(folder: Path, tmp_path: Path):
    spoiled = Path(shutil.copytree(folder, tmp_path / "base"))
    (spoiled / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"vae: no \.safetensors file"):
        PluginName(spoiled).check()
    with pytest.raises(ModelError, match="diffusers folder"):
        PluginName(tmp_path).check()
