"""A run killed anywhere, and started again, ends in the same bytes as one that was not."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path

import attrs
import forks
import numpy as np
import pytest
from armed import Point
from attrs import frozen
from forks import Forked
from harness import PIPELINE, Project, Whole, differences, fingerprint

ARMED = Path(__file__).with_name("armed.py")
SETTINGS: Mapping[str, object] = {
    "stage.soar.train": "{use='full'}",
    "stage.soar.ema": 0.9,
    "stage.soar.micro_batch": 2,
    "stage.soar.steps": 8,
    "stage.soar.checkpoint_every": 3,
    "stage.soar.keep": 1,
    "stage.soar.log_every": 2,
    "stage.soar.sample_every": 4,
    "stage.grpo.micro_batch": 2,
    "stage.grpo.steps": 6,
    "stage.grpo.checkpoint_every": 2,
    "stage.grpo.keep": 1,
    "stage.grpo.log_every": 3,
    "stage.grpo.sample_every": 3,
    "eval.batch": 2,
}
"""Two micro-batches a step, two checkpoints a stage and steps after the last; metrics that a checkpoint cuts in two."""
BRANCHES = """\
[[stage]]
name = "sft"
from = "base"
steps = 2
batch = 4
train = { use = "full" }
objective = { use = "sft" }

[[stage]]
name = "late"
from = "soar"
steps = 2
batch = 4
objective = { use = "sft" }

[eval]
"""
"""base -> {soar -> {grpo, late}, sft}; all but soar and sft train a LoRA on what they start from."""
BRANCH_POINTS = (
    Point("before a branch", "corefit.run.run:Run._train", call=3),
    Point("a branch from the base trained, not declared finished", "corefit.run.run:Run._train", after=True),
    Point("a branch from the base finished, not evaluated", "corefit.run.run:Run._evaluate", call=4),
    Point("second branch, between micro-batches", "corefit.train.loop:Loop._backward", call=2),
    Point("before the report", "corefit.run.run:Run._report"),
)
RENAME = "pathlib:Path.replace"
"""What was written under another name is about to get its own."""
POINTS = (
    Point("pipeline.toml half written", RENAME, inside="_write_pipeline"),
    Point("data being encoded", "corefit.data.mds:Writer.append", call=5),
    Point("a part encoded, not renamed", "corefit.system.files:publish", inside="_encode_partition"),
    Point("data encoded, the cache not put together", "corefit.data.cache:CacheBuilder.publish"),
    Point("data encoded, the cache not renamed", "corefit.system.files:publish", inside="publish"),
    Point("data encoded", "corefit.system.files:publish", inside="publish", after=True),
    Point("hashes of pictures half written", RENAME, inside="prepare"),
    Point("prompts encoded, the cache not renamed", "corefit.system.files:publish", inside="publish"),
    Point("base being evaluated", "corefit.run.evaluation.evaluator:Evaluator.media", call=2, inside="score"),
    Point("base evaluated, its samples not drawn", "corefit.run.evaluation.evaluator:Evaluator.keep_samples"),
    Point("base's samples drawn, its scores not written", RENAME, inside="_evaluate", call=2),
    Point("the stage's folder being made", RENAME, inside="_prepare_folder"),
    Point("first step, between micro-batches", "corefit.train.loop:Loop._backward", call=2),
    Point("step 3 logged and not saved", "corefit.train.loop:Loop.save"),
    Point("checkpoint 3 written, not renamed", "corefit.system.files:publish", inside="save"),
    Point("step 5 from checkpoint 3, between micro-batches", "corefit.train.loop:Loop._backward", call=12),
    Point("in the optimizer's step", "torch.optim:AdamW.step", call=2),
    Point("sample grid of step 4 half written", RENAME, inside="grid"),
    Point("checkpoint 6 renamed, 3 not removed", "corefit.system.files:publish", inside="save", after=True),
    Point("metrics being cut after step 6", RENAME, inside="truncate_after"),
    Point("trained, weights not averaged", "corefit.train.loop:Loop.finish"),
    Point("model written, not renamed", "corefit.system.files:publish", inside="_train"),
    Point("model renamed", "corefit.system.files:publish", inside="_train", after=True),
    Point("former model half removed", "os:unlink", inside="publish", after=True),
    Point("trained, not declared finished", "corefit.run.run:Run._train", after=True),
    Point("finished, not evaluated", "corefit.run.run:Run._evaluate", call=2),
    Point("being evaluated", "corefit.run.evaluation.evaluator:Evaluator.media", call=2, inside="score"),
    Point("between the stages", "corefit.run.run:Run._evaluate", call=2, after=True),
    Point("second stage, in a rollout", "corefit_backbones.sd3:Sd3.velocity", call=4, inside="experience"),
    Point("rolled out, between micro-batches", "corefit.train.loop:Loop._backward", call=2),
    Point("checkpoint 2 written, not renamed", "corefit.system.files:publish", inside="save"),
    Point("checkpoint 4 renamed, 2 half removed", "os:unlink", inside="save", after=True),
    Point("adapter written, not renamed", "corefit.system.files:publish", inside="_train"),
    Point("adapter renamed", "corefit.system.files:publish", inside="_train", after=True),
    Point("adapter finished, not evaluated", "corefit.run.run:Run._evaluate", call=3),
    Point("adapter being evaluated", "corefit.run.evaluation.evaluator:Evaluator.media", call=1, inside="score"),
    Point("before the report", "corefit.run.run:Run._report"),
    Point("results.json half written", RENAME, inside="write_results"),
    Point("comparison.png half written", RENAME, inside="comparison"),
    Point("report.html half written", RENAME, inside="page"),
    Point("all written", "corefit.run.report:print_table"),
)
"""In the order in which a run comes by; the names of corefit's functions are here and nowhere else."""


@frozen
class Forks(Project):
    """Started as a fork."""

    def start(self) -> Forked:
        return forks.start("-m", "corefit", "run", PIPELINE, *self.overrides, cwd=self.folder, log=self.log)

    def killed_at(self, point: Point) -> int:
        """Start it, to be killed there; how it ended, -9 if it was."""
        told = json.dumps(attrs.asdict(point))
        return forks.start(str(ARMED), told, "run", PIPELINE, *self.overrides, cwd=self.folder, log=self.log).wait()


def copied(project, name: str) -> Forks:
    """The fixture's project in a folder of its own, in SETTINGS."""
    folder = project.folder / name
    folder.mkdir()
    for path in project.folder.iterdir():
        if path.is_symlink() or path.is_file():
            shutil.copy(path, folder, follow_symlinks=False)
    return Forks(folder, SETTINGS)


@pytest.fixture
def whole(project) -> Forks:
    return copied(project, "whole")


@pytest.fixture
def killed(project) -> Forks:
    return copied(project, "killed")


def test_a_run_killed_where_it_hurts(whole, killed):
    assert whole.start().wait() == 0, whole.log.read_text()
    missed = [point.where for point in POINTS if killed.killed_at(point) != -signal.SIGKILL]
    assert not missed, killed.log.read_text()
    assert killed.start().wait() == 0, killed.log.read_text()
    wrong = differences(killed.outcome(), whole.outcome())
    assert not wrong, "\n".join(wrong)


def test_branches_killed_where_weights_are_handed_on(project):
    """Each start that goes on finds the weights of an earlier stage in its files, not those of the stage before."""
    project.swap(("[eval]\n", BRANCHES))
    settings = {key: value for key, value in SETTINGS.items() if "every" not in key}
    settings |= {"stage.soar.steps": 2, "stage.grpo.steps": 1}
    whole, killed = (attrs.evolve(copied(project, name), settings=settings) for name in ("whole", "killed"))
    assert whole.start().wait() == 0, whole.log.read_text()
    missed = [point.where for point in BRANCH_POINTS if killed.killed_at(point) != -signal.SIGKILL]
    assert not missed, killed.log.read_text()
    assert killed.start().wait() == 0, killed.log.read_text()
    wrong = differences(killed.outcome(), whole.outcome())
    assert not wrong, "\n".join(wrong)


def test_a_run_killed_at_random_instants(whole, killed):
    longer = {**SETTINGS, "stage.soar.steps": 40, "stage.grpo.steps": 20}
    whole, killed = attrs.evolve(whole, settings=longer), attrs.evolve(killed, settings=longer)
    expected = Whole.of(whole)
    earliest, latest = 0.8 * expected.startup, expected.startup + (expected.work - expected.startup) / 3
    one = expected.round(1, killed, np.random.default_rng(0).uniform(earliest, latest, 4).tolist())
    assert len(one.kills) > 1
    assert not one.wrong, "\n".join([*one.wrong, *map(str, one.kills)])


def test_a_fingerprint_has_every_name_and_no_clock(tmp_path):
    """What it must see, and what it must not."""
    run = tmp_path / "runs" / "digits"
    (run / "01-soar").mkdir(parents=True)
    (run / "results.json").write_text("[]")
    log = run / "01-soar" / "metrics.jsonl"
    log.write_text('{"step": 2, "loss": 0.5, "seconds": 1.5}\n')
    before = fingerprint(run)
    log.write_text('{"step": 2, "loss": 0.5, "seconds": 9.5}\n')
    assert differences(fingerprint(run), before) == []
    log.write_text('{"step": 2, "loss": 0.5, "seconds": 1.5}\n' * 2)
    (run / "results.json").write_text("[1]")
    (run / "01-soar" / ".partial-model").mkdir()
    assert differences(fingerprint(run), before) == [
        "01-soar/.partial-model: left over",
        "01-soar/metrics.jsonl: other content",
        "results.json: other content",
    ]
    (run / "results.json").unlink()
    assert "results.json: missing" in differences(fingerprint(run), before)
