"""What FLUX.1 alone has to show, and Chroma with it; parity with their pipelines is in test_families.py."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from vectors import golden

from corefit import Batch, Objective
from corefit.errors import ModelError
from corefit.rollout.samplers import FlowSde
from corefit.testing import ToyReward, check_backbone, tiny_chroma, tiny_flux, toy_context
from corefit.types import Weighted
from corefit_backbones import schedule
from corefit_backbones.chroma import Chroma
from corefit_backbones.flux import Flux
from corefit_flow_grpo import FlowGrpo
from corefit_sft import Sft
from corefit_soar import Soar

CPU = torch.device("cpu")
PROMPTS = ["a red dog", "a picture of the sky"]
KINDS: dict[str, Any] = {"dev": Flux, "schnell": Flux, "chroma": Chroma}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, words = tmp_path_factory.mktemp("flux"), ["a", "picture", "of", "red", "sky", "dog"]
    return {
        "dev": tiny_flux(root / "dev", words=words),
        "schnell": tiny_flux(root / "schnell", words=words, guidance_embeds=False),
        "chroma": tiny_chroma(root / "chroma", words=words),
    }


def loaded(folders: dict[str, Path], name: str, dtype: torch.dtype = torch.float32, **keys: Any) -> Any:
    backbone = KINDS[name](str(folders[name]), max_sequence_length=16, **keys)
    backbone.load(CPU, dtype)
    return backbone


def state(backbone: Any, n: int = 2) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, *backbone.latent_shape((24, 32)), generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([0.9971, 0.3333] * (n // 2))


def embedded(backbone: Any) -> list[list[float]]:
    """What the network embeds from now on: a timestep a call, and on dev a guidance after it."""
    seen: list[list[float]] = []
    backbone.transformer.time_text_embed.time_proj.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].tolist())
    )
    return seen


# ---- what the network is told


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
@pytest.mark.parametrize("name", KINDS)
def test_noise_level_and_guidance_are_not_rounded_with_the_latents(
    name: str, autocast: bool, folders: dict[str, Path]
) -> None:
    """diffusers would embed 996 for 997.1, and 4512 for a guidance of 4.5."""
    backbone = loaded(folders, name, torch.float32 if autocast else torch.bfloat16)
    (x, sigma), cond, seen = state(backbone), backbone.encode_text(PROMPTS), embedded(backbone)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        v = backbone.guided(x, sigma, cond, 4.5) if name == "dev" else backbone.velocity(x, sigma, cond)
    assert seen == [(1000 * sigma).tolist(), [4500.0, 4500.0]][: len(seen)]
    assert len(seen) == 1 + (name == "dev")
    assert v.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_bf16_computes_nearly_what_fp32_does(name: str, folders: dict[str, Path]) -> None:
    """Relative rms 0.006; with the timesteps that diffusers rounds, 0.016 on dev and 0.126 on Chroma."""
    n, made = 64, []
    for dtype in (torch.float32, torch.bfloat16):
        backbone = loaded(folders, name, dtype)
        x, _ = state(backbone, n)
        sigma = torch.rand(n, generator=torch.Generator().manual_seed(1))
        made.append(backbone.velocity(x, sigma, backbone.encode_text(PROMPTS[:1] * n)))
    exact, half = made
    assert (half - exact).square().mean().sqrt() < 0.01 * exact.square().mean().sqrt()


# ---- guidance


@torch.no_grad()
def test_dev_is_told_the_guidance_that_is_asked_for(folders: dict[str, Path]) -> None:
    for guidance in (1.0, 3.5):
        backbone = loaded(folders, "dev", guidance=guidance)
        (x, sigma), cond, seen = state(backbone), backbone.encode_text(PROMPTS), embedded(backbone)
        v = backbone.velocity(x, sigma, cond)
        assert torch.equal(backbone.guided(x, sigma, cond, 1.0), v)
        backbone.guided(x, sigma, cond, 2.5, v)
        assert [told[0] for told in seen[1::2]] == [1000 * guidance, 1000 * guidance, 2500]


@torch.no_grad()
def test_a_known_velocity_is_used_where_it_is_the_one_that_is_asked_for(folders: dict[str, Path]) -> None:
    backbone = loaded(folders, "dev", guidance=3.5)
    (x, sigma), cond = state(backbone), backbone.encode_text(PROMPTS)
    v = backbone.velocity(x, sigma, cond)
    seen = embedded(backbone)
    assert backbone.guided(x, sigma, cond, 3.5, v) is v
    assert backbone.guided(x, sigma, cond, 1.0, v) is v
    assert seen == []
    again = backbone.guided(x, sigma, cond, 4.5, v)
    assert torch.equal(again, backbone.guided(x, sigma, cond, 4.5))
    assert (again - v).abs().max() > 1e-4


def test_another_guidance_keeps_what_a_backbone_promises(folders: dict[str, Path]) -> None:
    check_backbone(loaded(folders, "dev", guidance=3.5), prompts=PROMPTS)


@torch.no_grad()
def test_schnell_has_no_guidance_to_be_told(folders: dict[str, Path]) -> None:
    backbone = Flux(str(folders["schnell"]), guidance=3.5)
    for refused in (backbone.check, lambda: backbone.load(CPU, torch.float32)):
        with pytest.raises(ModelError, match=r"guidance = 3.5: .*schnell has no guidance embedding; remove the key"):
            refused()
    backbone = loaded(folders, "schnell")
    (x, sigma), cond = state(backbone), backbone.encode_text(PROMPTS)
    v, null = backbone.velocity(x, sigma, cond), backbone.velocity(x, sigma, backbone.null(2))
    assert torch.allclose(backbone.guided(x, sigma, cond, 3.0, v), null + 3 * (v - null), atol=1e-5)


# ---- noise levels


def test_grids_and_shifts_are_the_published_ones() -> None:
    vectors = golden("schedules")
    for shift in vectors.meta["shifts"]:
        config = {"_class_name": schedule.EULER, "shift": shift, "num_train_timesteps": 1000}
        for steps in vectors.meta["Ns"]:
            vectors.check(f"infer.shift{shift}.N{steps}.sigmas", schedule.grid(config, steps, 0))
    unipc = {"_class_name": schedule.UNIPC, "use_flow_sigmas": True, "flow_shift": 3.0}
    unipc |= {"prediction_type": "flow_prediction", "num_train_timesteps": 1000}
    for steps in vectors.meta["Ns"]:
        vectors.check(f"wan_unipc.N{steps}.sigmas", schedule.grid(unipc, steps, 0))
    for tokens in vectors.meta["seq"]:
        found = schedule.mu({}, tokens)
        vectors.check(f"flux.L{tokens}.mu", torch.tensor([found], dtype=torch.float64))


def test_training_noise_is_shifted_as_sampling_is(folders: dict[str, Path]) -> None:
    """Not by the constructor's table, which of a dynamic scheduler is unshifted (math.md, schedules)."""
    dev, schnell = (KINDS[name](str(folders[name])) for name in ("dev", "schnell"))
    for size, tokens in (((32, 32), 256), ((64, 64), 1024), ((96, 32), 768)):
        shift = dev.shift((4, *size))
        assert shift == pytest.approx(math.exp(schedule.mu({}, tokens)))
        t = torch.linspace(1, 1 / 8, 8)
        assert torch.allclose(dev.sigmas(8, (4, *size))[:-1], shift * t / (1 + (shift - 1) * t), atol=1e-6)
        assert schnell.shift((4, *size)) == 1


# ---- training


def adapted(folders: dict[str, Path], name: str) -> Any:
    backbone = loaded(folders, name)
    backbone.transformer.requires_grad_(False)
    backbone.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=list(backbone.lora_targets)))
    for i, parameter in enumerate(trained(backbone).values()):
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    return backbone


def trained(backbone: Any) -> dict[str, Any]:
    return {name: p for name, p in backbone.transformer.named_parameters() if p.requires_grad}


OBJECTIVES: dict[str, Objective[Any]] = {
    "sft": Sft(),
    "soar": Soar(points=2, guidance=3.5),
    "flow_grpo": FlowGrpo(group=2, steps=4, guidance=3.5),
}


@pytest.mark.parametrize("use", OBJECTIVES)
@pytest.mark.parametrize("name", KINDS)
def test_a_step_of_training_reaches_every_weight_and_is_saved(
    name: str, use: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    backbone, objective = adapted(folders, name), OBJECTIVES[use]
    media = torch.rand(4, 3, 24, 32, generator=torch.Generator().manual_seed(2))
    prompts = [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    with torch.no_grad():
        x0, cond = backbone.encode(media), backbone.encode_text(prompts)
    batch = Batch(x0, cond, prompts, [{}] * 4, range(4), tuple(x0.shape[1:]))
    sampler = FlowSde(noise=0.7) if use == "flow_grpo" else None
    ctx = toy_context(backbone, range(4), sampler=sampler, rewards=[Weighted("toy", ToyReward(), 1.0)])
    for part in objective.experience(batch, ctx):
        for term in objective.terms(part, ctx):
            (term.total / term.count).backward()
    weights = trained(backbone)
    for weight in weights.values():
        assert weight.grad is not None
        assert weight.grad.isfinite().all()
        assert weight.grad.abs().sum() > 0
        weight.data -= 0.1 * weight.grad / weight.grad.norm()

    backbone.save(tmp_path)
    again = loaded(folders, name)
    again.load_lora(tmp_path)
    assert {n: p.tolist() for n, p in trained(again).items()} == {n: p.tolist() for n, p in weights.items()}


@pytest.mark.parametrize("name", KINDS)
def test_a_lora_adapts_blocks_of_both_kinds(name: str, folders: dict[str, Path]) -> None:
    kinds = {module.split(".")[0] for module in trained(adapted(folders, name))}
    assert kinds == {"transformer_blocks", "single_transformer_blocks"}


# ---- what a user can get wrong


@pytest.mark.parametrize("name", ["dev", "chroma"])
def test_latents_that_cannot_be_scaled_are_refused(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folders[name], tmp_path / "copy"))
    config = copied / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0}))
    with pytest.raises(ModelError, match="scaling_factor is 0; latents are divided by it"):
        KINDS[name](str(copied)).check()


@pytest.mark.parametrize("name", ["dev", "chroma"])
def test_a_network_of_other_channels_is_refused(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """FLUX.1 Fill's, for example, which has the mask and the masked picture as further channels."""
    copied = Path(shutil.copytree(folders[name], tmp_path / "copy"))
    config = copied / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "in_channels": 96}))
    with pytest.raises(ModelError, match="96 input channels, and the VAE's latents need 16"):
        KINDS[name](str(copied)).check()
