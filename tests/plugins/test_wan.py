"""Wan: what test_families.py does not ask of every family. Published numbers, two experts, prompts, sizes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from conftest import WORDS, Project
from processes import as_one, ended, settings, two
from torch import Tensor
from vectors import golden

from corefit.errors import ConfigError
from corefit.flow import expand_like
from corefit.rollout.samplers import DanceSde
from corefit.testing import check_backbone, tiny_wan
from corefit_backbones import wan
from corefit_backbones.wan import Wan

CPU = torch.device("cpu")
LENGTH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan(tmp_path_factory.mktemp("wan") / "base", words=WORDS)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan(tmp_path_factory.mktemp("a14b") / "base", words=WORDS, experts=2)


def loaded(folder: Path, **keys: Any) -> Wan:
    backbone = Wan(str(folder), max_sequence_length=LENGTH, **keys)
    backbone.load(CPU, torch.float32)
    return backbone


# published numbers


@pytest.mark.parametrize("steps", [10, 40])
def test_the_grid_is_the_published_one(folder: Path, steps: int) -> None:
    grid = Wan(str(folder)).sigmas(steps, (4, 2, 2, 2))
    golden("schedules").check(f"wan_unipc.N{steps}.sigmas", grid)


def test_a_step_of_the_published_sde() -> None:
    """Its noise is sigmas[1] sigma, a constant for each row: with it, the drift is Flow-SDE's."""
    vectors = golden("wan_flow_sde")
    x, v, draw, sigma, sigma_next = vectors.inputs(
        "vid", ["sample", "velocity", "noise", "sigma", "sigma_next"], torch.float32
    )
    for row, noise in enumerate((vectors["vid.sigma_max"] * sigma).tolist()):
        one, sampler = slice(row, row + 1), DanceSde(noise)
        step = sampler.step(x[one], v[one], sigma[one], sigma_next[one])
        x_next = step.mean + expand_like(step.std, x[one]) * draw[one]
        vectors.check("vid.mean.f32", step.mean, [row])
        vectors.check("vid.next.f32", x_next, [row])
        vectors.check("vid.log_prob.f32", sampler.log_prob(x_next, step), [row])
        vectors.check("vid.log_prob_given.f32", sampler.log_prob(vectors["vid.next_given"][one], step), [row])


# two experts


def inputs(backbone: Wan, sigma: list[float]) -> tuple[Tensor, Tensor, Any]:
    n = len(sigma)
    x = torch.randn(n, *backbone.latent_shape((5, 16, 16)), generator=torch.Generator().manual_seed(0))
    return x, torch.tensor(sigma), backbone.encode_text(["a red sky", "a sea", "a blue picture"][:n])


def calls(backbone: Wan) -> list[tuple[str, int]]:
    """Notes (expert, rows) of each call."""
    seen: list[tuple[str, int]] = []
    for name in ("transformer", "transformer_2"):
        getattr(backbone.transformer, name).register_forward_pre_hook(
            lambda module, args, name=name: seen.append((name, len(args[0])))
        )
    return seen


def test_an_expert_without_rows_costs_nothing_and_has_a_gradient_of_0(both: Path) -> None:
    """Not none: the optimizer would then do otherwise than where another process has rows for it."""
    backbone = loaded(both)
    seen = calls(backbone)
    backbone.velocity(*inputs(backbone, [0.2, 0.5])).square().sum().backward()
    assert seen == [("transformer_2", 2)]
    grads = {name: p.grad for name, p in backbone.transformer.named_parameters()}
    assert all(g is not None for g in grads.values())
    busy = {name.split(".")[0] for name, g in grads.items() if g is not None and bool(g.any())}
    assert busy == {"transformer_2"}


def test_two_experts_keep_what_a_backbone_promises_of_pictures(both: Path) -> None:
    check_backbone(loaded(both), prompts=["a red sky", "a sea"])


def test_frozen_experts_have_no_graph(both: Path) -> None:
    backbone = loaded(both)
    backbone.transformer.requires_grad_(False)
    assert not backbone.velocity(*inputs(backbone, [0.2, 0.5])).requires_grad


RANKS = """
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path[:0] = sys.argv[2].split(os.pathsep)
from test_wan import CPU, inputs, loaded

from corefit.train import weights

dist.init_process_group("gloo")
rank, folder = dist.get_rank(), Path(sys.argv[1])
alone, ddp, sharded = loaded(folder), loaded(folder), loaded(folder, gradient_checkpointing=True)
ddp.transformer = DistributedDataParallel(ddp.transformer)
weights.shard(sharded.transformer, CPU)
for sigma in ([0.95, 0.2], [0.2, 0.95], [0.95, 0.9], [0.2, 0.3]):
    x, levels, cond = inputs(alone, sigma)
    mine = slice(rank, rank + 1)
    alone.transformer.zero_grad()
    v = alone.velocity(x, levels, cond)
    v.square().sum().backward()
    expected = {name: p.grad / 2 for name, p in alone.transformer.named_parameters()}
    for shared in (ddp, sharded):
        shared.transformer.zero_grad()
        with torch.no_grad():
            assert torch.allclose(shared.velocity(x[mine], levels[mine], cond[mine]), v[mine], atol=1e-5), sigma
        shared.velocity(x[mine], levels[mine], cond[mine]).square().sum().backward()
        for name, p in shared.transformer.named_parameters():
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            assert torch.allclose(grad, expected[name.removeprefix("module.")], atol=1e-4, rtol=1e-4), (sigma, name)
dist.barrier()
os._exit(0)  # DDP still holds gloo's threads, with which an interpreter may not end in peace
"""


def test_two_processes_may_need_different_experts(both: Path, tmp_path: Path) -> None:
    """With rows on either side of the boundary, or on one: the velocity and gradients of one process, DDP and FSDP2."""
    (tmp_path / "ranks.py").write_text(RANKS)
    command = ("ranks.py", str(both), os.pathsep.join(map(str, Path(__file__).parents[:2])))
    done = ended(*forks.ranks(command, command, cwd=tmp_path))
    assert done.status == 0, done.err


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_two_processes_train_both_sharded_experts_as_one_does(mode: str, project: Project) -> None:
    """SOAR and GRPO with steps that reach into the gradients of both: their noise levels are on either side."""
    (project.folder / "base").unlink()
    tiny_wan(project.folder / "base", words=WORDS, experts=2, boundary=0.6)
    project.swap(('use = "sd3"', 'use = "wan"'), ("steps = 2", "steps = 4"))
    rates = tuple(f"stage.{name}.optimizer.lr=1e-2" for name in ("soar", "grpo"))
    keys = ("shard=true", "stage.soar.micro_batch=1", f"backbone.train={{use='{mode}'}}", *rates)
    as_one(project, keys, two(project, "run", "pipeline.toml", *settings("name='two'", *keys)))


# prompts and sizes


def test_prompts_are_cleaned_as_in_diffusers_and_zero_behind_their_end(folder: Path) -> None:
    backbone = loaded(folder)
    embeds = backbone.encode_text(["  a red \n sky &amp;lt;", "a red sky <"]).tensors["prompt_embeds"]
    assert torch.equal(embeds[0], embeds[1])
    (alone,) = backbone.encode_text(["a red sky"]).tensors["prompt_embeds"]
    assert alone.shape == (LENGTH, backbone.condition_shapes()["prompt_embeds"][1])
    assert not alone[4:].any()  # three words and the end
    assert alone[:4].any(1).all()


def test_what_mends_prompts_is_part_of_the_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ftfy changes curly quotes, for example; a cache made without it is not one made with it."""
    backbone = Wan(str(folder))
    backbone.place(CPU, torch.float32)
    keys = []
    for there, number in ((None, ""), (object(), "6.1"), (object(), "6.2")):
        monkeypatch.setattr(wan, "find_spec", lambda name, there=there: there)
        monkeypatch.setattr(wan, "version", lambda name, number=number: number)
        keys.append(backbone.encoding_key())
    assert len({tuple(sorted(key.items())) for key in keys}) == 3
    assert {name for name in keys[0] if keys[0][name] != keys[1][name]} == {"text_mended"}


def test_the_length_of_text_is_part_of_the_key(folder: Path) -> None:
    keys = []
    for length in (8, 16):
        backbone = Wan(str(folder), max_sequence_length=length)
        backbone.place(CPU, torch.float32)
        keys.append(backbone.encoding_key())
    assert {name for name in keys[0] if keys[0][name] != keys[1][name]} == {"text_length"}


@pytest.mark.parametrize("size", [(), (16,), (1, 5, 16, 16)])
def test_a_size_is_of_clips_or_of_pictures(folder: Path, size: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"it is \[frames, height, width\] of clips, or \[height, width\]"):
        Wan(str(folder)).latent_shape(size)


@pytest.mark.parametrize(("frames", "near"), [(0, "1"), (2, "1 or 5"), (4, "1 or 5"), (80, "77 or 81")])
def test_frames_that_would_be_cut_off_are_refused(folder: Path, frames: int, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"a multiple of 4 and one more; nearest: {near}$"):
        Wan(str(folder)).latent_shape((frames, 16, 16))
