"""Every objective as a stage of one pipeline: equal on one process and on two, in any micro-batches, after any kill.

A new objective needs an entry in OBJECTIVES, and nothing else here.
"""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from attrs import frozen
from conftest import Project, fill, write_lines
from processes import metrics, two, weights
from safetensors.torch import load_file

ARMED = Path(__file__).parents[1] / "faults" / "armed.py"
RL = "group=2, steps=4, guidance=2.0"


@frozen
class Entry:
    """A stage: its objective's table, which of the stage's keys go with it, and how far two ranks may be from one."""

    objective: str
    keys: str = "noise"
    apart: float = 1e-5
    """Gradients of rewards pass the decoder, whose rounding differs between batches of one and of two pictures."""


OBJECTIVES: Mapping[str, Entry] = {
    "drawn": Entry("use='drawn', updates=2", "noise"),
    "sum": Entry("use='sum', of=[{use='drawn', updates=2}, {use='sft', perturbation=0.1, weight=0.5}]", "noise"),
    "soar": Entry("use='soar', points=2, paths=2", "noise sampler"),
    "grpo": Entry(f"use='flow_grpo', {RL}, beta=50.0, updates=2", "sampler reward"),
    "dpo": Entry("use='dpo', sft=0.1, reference_every=2", "noise"),
    "online_dpo": Entry(f"use='online_dpo', {RL}, draws=2, epochs=2", "noise reward"),
    "nft": Entry(f"use='nft', {RL}, decay=0.5", "reward"),
    "awm": Entry(f"use='awm', {RL}, train_timesteps=2", "reward"),
    "refl": Entry("use='reward_gradient', method='refl', steps=4", "reward", 1e-4),
    "draft": Entry("use='reward_gradient', method='draft', steps=4, guidance=2.0, truncation=2", "reward", 1e-4),
    "draft_lv": Entry("use='reward_gradient', method='draft_lv', steps=4, guidance=2.0", "reward", 1e-4),
    "leap_align": Entry("use='reward_gradient', method='leap_align', steps=4, guidance=2.0", "reward", 1e-4),
}
"""Two optimizer steps a batch where an objective can, so that copies and old policies differ from the policy."""
KEYS = {
    "noise": 'noise = { use = "logit_normal" }',
    "sampler": 'sampler = { use = "flow_sde", noise = 0.7 }',
    "reward": 'reward = [{ use = "red" }]',
}
HEAD = """\
name = "objectives"
plugins = ["own.py"]
precision = "fp32"

[backbone]
use = "sd3"
path = "base"
max_sequence_length = 16

[data]
source = { use = "jsonl", path = "pairs.jsonl", extra = { rejected = "rejected" } }
size = [16, 16]
"""
STAGE = """
[[stage]]
name = "{name}"
steps = 2
batch = 4
checkpoint_every = 1
log_every = 1
optimizer = {{ lr = 1e-3, eps = 1e-3 }}
objective = {{ {objective} }}
"""
"""Adam divides by a gradient's size: rounding of a gradient near 0 must not become a step."""
OWN = '''\
"""A reward with a gradient, and an objective with a copy of each kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

from attrs import frozen

from corefit import Batch, Context, Moving, Objective, Reward, Term, hookimpl
from corefit.flow import interpolate, per_sample


@frozen
class Red(Reward):
    """How red a picture is."""

    differentiable: ClassVar[bool] = True

    def score(self, media, prompts, meta):
        return media[:, 0].flatten(1).mean(1) - media[:, 1:].flatten(1).square().mean(1)


@frozen
class Drawn(Objective[Batch]):
    """Flow matching that is drawn to one copy that moves per batch, and to one that moves per update."""

    updates: int = 1
    """Number of optimizer steps on each batch."""

    @property
    def uses(self) -> frozenset[str]:
        return frozenset({"media", "noise"})

    @property
    def num_terms(self) -> int:
        return 1

    @property
    def num_updates(self) -> int:
        return self.updates

    @property
    def copies(self) -> Mapping[str, Moving]:
        return {"old": Moving(lambda n: n / (n + 1)), "near": Moving(lambda n: 0.5, per="update")}

    def experience(self, batch: Batch, ctx: Context) -> Iterable[Batch]:
        for _ in range(self.updates):
            yield batch

    def terms(self, batch: Batch, ctx: Context) -> Iterator[Term]:
        x0 = batch.clean
        noise, sigma = ctx.randn_like(x0), ctx.sigma(x0)
        x = interpolate(x0, noise, sigma)
        v = ctx.backbone.velocity(x, sigma, batch.cond)
        loss = per_sample((v - (noise - x0)) ** 2)
        for copy in ctx.copies.values():
            loss = loss + 20 * per_sample((v - copy.velocity(x, sigma, batch.cond)) ** 2)
        yield Term.of(loss)


@hookimpl
def corefit_rewards():
    return {"red": Red}


@hookimpl
def corefit_objectives():
    return {"drawn": Drawn}
'''
Alone = Callable[[str], Path]
MODES = {"full": "backbone.train={use='full'}", "lora": "backbone.train={use='lora', rank=2}"}


@pytest.fixture
def stages(project: Project) -> Project:
    """A project whose pipeline has a stage for each objective."""
    write(project.folder)
    return project


def write(folder: Path) -> None:
    """Write that pipeline, its plugin and its data."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    media = [row["media"] for row in rows]
    pairs = [{**row, "rejected": media[index - 1]} for index, row in enumerate(rows)]
    write_lines(folder / "pairs.jsonl", *pairs)
    (folder / "own.py").write_text(OWN)
    written = [HEAD]
    for name, entry in OBJECTIVES.items():
        written.append(STAGE.format(name=name, objective=entry.objective))
        written += [KEYS[key] + "\n" for key in entry.keys.split()]
    (folder / "pipeline.toml").write_text("".join(written))


def arguments(name: str, *settings: str) -> Sequence[str]:
    return ["run", "pipeline.toml", *(word for key in (f"name={name!r}", *settings) for word in ("--set", key))]


def ran(project: Project, name: str, *settings: str) -> Path:
    done = project.main(*arguments(name, *settings))
    assert done.status == 0, done.err
    return project.folder / "runs" / name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, pictures: Path) -> Alone:
    """A finished run of one process in that mode, in a project of its own; not to be changed by tests."""

    @functools.cache
    def made(mode: str) -> Path:
        folder = tmp_path_factory.mktemp("alone")
        fill(folder, checkpoint, pictures)
        write(folder)
        started = forks.start("-m", "corefit", *arguments("alone", MODES[mode]), cwd=folder)
        assert started.wait() == 0, started.communicate()[1]
        return folder / "runs" / "alone"

    return made


def folders(run: Path) -> Mapping[str, Path]:
    return {name: run / f"{number:02d}-{name}" for number, name in enumerate(OBJECTIVES, 1)}


def differ(one: Path, other: Path, strict: bool = False) -> dict[str, tuple[float, float]]:
    """Stage -> largest difference of its weights and of its metrics, relative, where it is too large."""
    found: dict[str, tuple[float, float]] = {}
    for name, entry in OBJECTIVES.items():
        a, b = folders(one)[name], folders(other)[name]
        wa, wb = weights(a), weights(b)
        assert wa
        assert wa.keys() == wb.keys()
        size = max(float(t.abs().max()) for t in wa.values())
        weight = max(float((wa[key] - wb[key]).abs().max()) for key in wa) / size
        ma, mb = np.array(metrics(a)), np.array(metrics(b))
        assert ma.shape == mb.shape
        metric = float((np.abs(ma - mb) / np.maximum(np.abs(ma), 1)).max())
        if weight > (0 if strict else entry.apart) or metric > (0 if strict else 10 * entry.apart):
            found[name] = weight, metric
    return found


@pytest.mark.parametrize(
    ("mode", "shard"),
    [
        pytest.param("lora", "false", id="ddp lora", marks=pytest.mark.slow),
        pytest.param("full", "true", id="fsdp full"),
        pytest.param("full", "false", id="ddp full", marks=pytest.mark.slow),
        pytest.param("lora", "true", id="fsdp lora", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one_does(stages: Project, alone: Alone, mode: str, shard: str) -> None:
    done = two(stages, *arguments("two", MODES[mode], f"shard={shard}"))
    assert done.status == 0, done.err
    assert differ(alone(mode), stages.folder / "runs" / "two") == {}


def test_micro_batches_and_autocast(stages: Project, alone: Alone) -> None:
    """Micro-batches change nothing but rounding; under autocast to bfloat16 every objective trains."""
    assert (
        differ(alone("lora"), ran(stages, "parts", MODES["lora"], *(f"stage.{n}.micro_batch=2" for n in OBJECTIVES)))
        == {}
    )
    once = (f"stage.{n}.steps=1" for n in OBJECTIVES)
    half = ran(stages, "half", MODES["lora"], "precision='bf16'", *once)
    assert all(np.isfinite(metrics(folder)).all() for folder in folders(half).values())


def test_killed_in_each_stage_it_ends_in_the_same_bytes(stages: Project, alone: Alone) -> None:
    """Each stage is killed after its last step, before the checkpoint of it, and goes on from that of the step before.

    The next start takes that step again and the two of the next stage.
    """
    whole = alone("full")
    for number in range(len(OBJECTIVES)):
        point = {"where": "after a step", "target": "corefit.train.loop:Loop.report_step", "call": 3 if number else 2}
        start = forks.start(str(ARMED), json.dumps(point), *arguments("killed", MODES["full"]), cwd=stages.folder)
        assert start.wait() == -signal.SIGKILL, start.communicate()[1]
    killed = ran(stages, "killed", MODES["full"])
    assert differ(whole, killed, strict=True) == {}
    for name, folder in folders(whole).items():
        a, b = (checkpointed(each) for each in (folder, folders(killed)[name]))
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == [], name


def checkpointed(stage: Path) -> Mapping[str, torch.Tensor]:
    """The tensors of a stage's last checkpoint; their order in the file depends on whether it was resumed."""
    files = stage.glob("checkpoints/step-000002/*.safetensors")
    return {name: t for file in files for name, t in load_file(file).items()}
