"""Two processes that share each sample, a part of its sequence each, do what one does with all of it."""

from __future__ import annotations

import forks
import pytest
from conftest import BRIGHT, WORDS, Project
from processes import as_one, ended, settings, two

from corefit.testing import tiny_flux, tiny_wan

SIZE = "data.size=[32, 32]"
DRAFT = (
    "stage.grpo.objective={use='reward_gradient', method='draft', truncation=3, steps=4, guidance=2.0}",
    "stage.soar.objective={use='sft'}",
    "stage.grpo.optimizer.lr=1e-2",
)


@pytest.fixture
def clips(project: Project) -> Project:
    """The usual project with Wan in place of SD3."""
    (project.folder / "base").unlink()
    tiny_wan(project.folder / "base", words=WORDS)
    project.swap(('use = "sd3"', 'use = "wan"'))
    return project


RANKS = '''
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from corefit.system.layout import Layout
from corefit.system.ranks import join
from corefit.train import sharding
from corefit_backbones.flux import Flux
from corefit_backbones.wan import Wan

CPU = torch.device("cpu")
ranks = join("fp32", Layout(context=2))
folder = Path(sys.argv[1])


def gradient(p, q):
    """The gradient of a weight of the network that is split, from its parts on both ranks."""
    if hasattr(q.grad, "full_tensor"):
        return 2 * q.grad.full_tensor()  # FSDP2 gives the mean
    total = torch.zeros_like(p) if q.grad is None else q.grad.clone()
    dist.all_reduce(total)
    return total


for family, name, size, sharded in ((Flux, "flux", (32, 32), False), (Wan, "wan", (5, 32, 32), True)):
    alone, split = (family(str(folder / name), max_sequence_length=16) for _ in range(2))
    for backbone in (alone, split):
        backbone.load(CPU, torch.float32)
    split.split_context(2, CPU)
    if sharded:
        sharding.shard(split.transformer, CPU)
    x = torch.randn(2, *alone.latent_shape(size), generator=torch.Generator().manual_seed(0))
    cond = alone.encode_text(["a red sky", "a sea"])
    for sigma in ([0.95, 0.2], [0.3, 0.4]):
        found = []
        for backbone in (alone, split):
            backbone.transformer.zero_grad()
            given = x.clone().requires_grad_()
            v = backbone.guided(given, torch.tensor(sigma), cond, 3.0)
            v.square().sum().backward()
            found += [v.detach(), given.grad]
        assert torch.allclose(found[0], found[2], atol=1e-5), (name, sigma)
        assert torch.allclose(found[1], found[3], atol=1e-5, rtol=1e-5), (name, sigma)
        assert found[1].abs().max() > 0.1
        for (weight, p), q in zip(alone.transformer.named_parameters(), split.transformer.parameters(), strict=True):
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            assert torch.allclose(gradient(p, q), expected, atol=1e-4, rtol=1e-4), (name, sigma, weight)
ranks.barrier()
'''


def test_velocity_and_gradients_are_those_of_one_process(tmp_path):
    """FLUX.1, and two experts of Wan under FSDP2, of which one may have no rows."""
    tiny_flux(tmp_path / "flux", words=WORDS)
    tiny_wan(tmp_path / "wan", words=WORDS, experts=2)
    (tmp_path / "ranks.py").write_text(RANKS)
    done = ended(*forks.ranks(*[("ranks.py", str(tmp_path))] * 2, cwd=tmp_path))
    assert done.status == 0, done.err


@pytest.mark.parametrize(
    ("keys", "more"),
    [
        ((SIZE, "stage.grpo.optimizer.lr=1e-2"), ()),
        pytest.param((SIZE, "backbone.train={use='full'}", *DRAFT), ("shard=true",), marks=pytest.mark.slow),
    ],
    ids=["ddp lora, soar and grpo", "fsdp full, gradients of rewards"],
)
def test_two_processes_that_share_samples_train_as_one_does(clips, keys, more):
    """The gradient of a reward also passes through the network's input, of which each process has a part."""
    if more:
        clips.write(clips.text.replace('sampler = { use = "flow_sde", noise = 0.7 }\n', ""))
        bright = BRIGHT.replace("    gain:", "    differentiable = True\n    gain:", 1)
        (clips.folder / "bright.py").write_text(bright)
    shared = (*keys, *more, "name='two'", "context_parallel=2")
    as_one(clips, keys, two(clips, "run", "pipeline.toml", *settings(*shared)))


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("context_parallel=3", "context_parallel: the 2 attention heads are no multiple of 3"),
        ("data.size=[16, 16]", "context_parallel: the 1 tokens of [16, 16] are no multiple of 2"),
        ("context_parallel=0", "context_parallel: must be >= 1"),
    ],
)
def test_what_cannot_be_split_is_refused_before_weights_are_read(clips, key, said):
    ended = clips.main("check", "pipeline.toml", *settings(SIZE, "context_parallel=2", key))
    assert ended.status == 2
    assert said in ended.err


def test_a_family_without_a_plan_is_refused(project):
    ended = project.main("check", "pipeline.toml", *settings("context_parallel=2"))
    assert ended.status == 2
    assert "context_parallel: diffusers has no plan by which to split a sample of SD3Transformer2DModel" in ended.err


def test_one_process_cannot_share_its_samples(clips):
    ended = clips.main("run", "pipeline.toml", *settings(SIZE, "context_parallel=2"))
    assert ended.status == 2
    assert "context_parallel = 2: the number of processes, 1, is no multiple of it" in ended.err
