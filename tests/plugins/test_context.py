"""Two processes that share each sample, a part of its sequence each, do what one does with all of it."""

from __future__ import annotations

import pytest
from conftest import BRIGHT, WORDS, Project
from processes import as_one, settings, two

from corefit.testing import tiny_wan

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


@pytest.mark.parametrize(
    ("keys", "more"),
    [((SIZE, "stage.grpo.optimizer.lr=1e-2"), ()), ((SIZE, "backbone.train={use='full'}", *DRAFT), ("shard=true",))],
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
    assert "context_parallel = 2: 1 processes are no multiple of it" in ended.err
