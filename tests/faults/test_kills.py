"""A run killed with SIGKILL, at random instants or where it hurts, ends in the same bytes as one that was not.

Run as a program, this file is the launcher of the second: it imports what a run needs once, and forks each start.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import pytest
from attrs import frozen

from benchmarks.faults import Project, Whole, differences, fingerprint

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
IMPORTED = (
    "corefit.cli:main",
    "corefit.run.run:run",
    "accelerate:Accelerator",
    "diffusers:StableDiffusion3Pipeline",
    "matplotlib.backends.backend_agg:FigureCanvasAgg",
    "peft:LoraConfig",
    "streaming:MDSWriter",
    "torch.distributed.checkpoint:save",
)
"""What a start imports, so that a fork need not; this only saves time."""


@frozen
class Point:
    """Where a process kills itself: as it calls `target` ("module:name") for the `call`th time, or just `after` that.

    Calls count that are made, at any depth, `inside` a function of that name. Each point is reached by the start that
    follows the kill at the point before it.
    """

    where: str
    target: str
    call: int = 1
    inside: str = ""
    after: bool = False

    def arm(self) -> None:
        """Patch the target in this process."""
        owner, name = named(self.target)
        real, calls = getattr(owner, name), 0

        @functools.wraps(real)
        def counted(*args, **kwargs):
            nonlocal calls
            calls += self._counts()
            if calls == self.call and self._counts() and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if calls == self.call and self._counts():
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, counted)

    def _counts(self) -> bool:
        frame = sys._getframe(2) if self.inside else None
        while frame and frame.f_code.co_name != self.inside:
            frame = frame.f_back
        return frame is not None or not self.inside


def named(target: str) -> tuple[Any, str]:
    """The module or class that "module:name" is in, and the last part of its name."""
    module, _, path = target.partition(":")
    *parents, name = path.split(".")
    return functools.reduce(getattr, parents, importlib.import_module(module)), name


RENAME = "pathlib:Path.replace"
"""What was written under another name is about to get its own."""
POINTS = (
    Point("pipeline.toml half written", RENAME, inside="_write_pipeline"),
    Point("data being encoded", "corefit.data.mds:Writer.append", call=5),
    Point("a part encoded, not renamed", "corefit.system.files:publish", inside="_part"),
    Point("data encoded, the cache not put together", "corefit.data.cache:CacheBuilder.publish"),
    Point("data encoded, the cache not renamed", "corefit.system.files:publish", inside="publish"),
    Point("data encoded", "corefit.system.files:publish", inside="publish", after=True),
    Point("hashes of pictures half written", RENAME, inside="prepare"),
    Point("prompts encoded, the cache not renamed", "corefit.system.files:publish", inside="publish"),
    Point("base being evaluated", "corefit.run.evaluate:Evaluator.media", call=2, inside="score"),
    Point("base evaluated, its samples not drawn", "corefit.run.evaluate:Evaluator.keep_samples"),
    Point("base's samples drawn, its scores not written", RENAME, inside="_judge", call=2),
    Point("the stage's folder being made", RENAME, inside="_claim"),
    Point("first step, between micro-batches", "corefit.train.loop:Loop._backward", call=2),
    Point("step 3 logged and not saved", "corefit.train.loop:Loop.save"),
    Point("checkpoint 3 written, not renamed", "corefit.system.files:publish", inside="save"),
    Point("step 5 from checkpoint 3, between micro-batches", "corefit.train.loop:Loop._backward", call=12),
    Point("in the optimiser's step", "torch.optim:AdamW.step", call=2),
    Point("sample grid of step 4 half written", RENAME, inside="grid"),
    Point("checkpoint 6 renamed, 3 not removed", "corefit.system.files:publish", inside="save", after=True),
    Point("metrics being cut after step 6", RENAME, inside="truncate_after"),
    Point("trained, weights not averaged", "corefit.train.loop:Loop.finish"),
    Point("model written, not renamed", "corefit.system.files:publish", inside="_train"),
    Point("model renamed", "corefit.system.files:publish", inside="_train", after=True),
    Point("former model half removed", "os:unlink", inside="publish", after=True),
    Point("trained, not declared finished", "corefit.run.run:Run._train", after=True),
    Point("finished, not evaluated", "corefit.run.run:Run._evaluate", call=2),
    Point("being evaluated", "corefit.run.evaluate:Evaluator.media", call=2, inside="score"),
    Point("between the stages", "corefit.run.run:Run._evaluate", call=2, after=True),
    Point("second stage, in a rollout", "corefit_backbones.sd3:Sd3.velocity", call=4, inside="experience"),
    Point("rolled out, between micro-batches", "corefit.train.loop:Loop._backward", call=2),
    Point("checkpoint 2 written, not renamed", "corefit.system.files:publish", inside="save"),
    Point("checkpoint 4 renamed, 2 half removed", "os:unlink", inside="save", after=True),
    Point("adapter written, not renamed", "corefit.system.files:publish", inside="_train"),
    Point("adapter renamed", "corefit.system.files:publish", inside="_train", after=True),
    Point("adapter finished, not evaluated", "corefit.run.run:Run._evaluate", call=3),
    Point("adapter being evaluated", "corefit.run.evaluate:Evaluator.media", call=1, inside="score"),
    Point("before the report", "corefit.run.run:Run._report"),
    Point("results.json half written", RENAME, inside="write_results"),
    Point("comparison.png half written", RENAME, inside="comparison"),
    Point("report.html half written", RENAME, inside="page"),
    Point("all written", "corefit.run.report:print_table"),
)
"""In the order in which a run comes by; the names of corefit's functions are here and nowhere else."""


def copied(project, name: str) -> Project:
    """The fixture's project in a folder of its own, in SETTINGS."""
    folder = project.folder / name
    folder.mkdir()
    for path in project.folder.iterdir():
        if path.is_symlink() or path.is_file():
            shutil.copy(path, folder, follow_symlinks=False)
    return Project(folder, SETTINGS)


def launched(project: Project, points: Sequence[Point | None]) -> list[int]:
    """Start the pipeline once a point, each killed there, or nowhere for None; how each ended, -9 if killed."""
    told = json.dumps([point and attrs.asdict(point) for point in points])
    command = [sys.executable, __file__, told, "run", "pipeline.toml", *project.overrides]
    with project.log.open("wb") as log:
        done = subprocess.run(
            command,
            cwd=project.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=log,
            timeout=300,
        )
    assert done.returncode == 0, project.log.read_text()
    return json.loads(done.stdout)


@pytest.fixture
def whole(project) -> Project:
    return copied(project, "whole")


@pytest.fixture
def killed(project) -> Project:
    return copied(project, "killed")


def test_a_run_killed_where_it_hurts(whole, killed):
    assert launched(whole, [None]) == [0], whole.log.read_text()
    *ended, end = launched(killed, [*POINTS, None])
    missed = [point.where for point, status in zip(POINTS, ended, strict=True) if status != -signal.SIGKILL]
    assert not missed, killed.log.read_text()
    assert end == 0, killed.log.read_text()
    wrong = differences(killed.outcome(), whole.outcome())
    assert not wrong, "\n".join(wrong)


def test_a_run_killed_at_random_instants(whole, killed):
    """The command itself, a process of its own each time."""
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


# the launcher


def main(points: str, *arguments: str) -> None:
    """Fork a start of `corefit arguments` a point; what they say goes to stderr, how they ended to stdout."""
    for target in IMPORTED:
        getattr(*named(target))
    assert threading.active_count() == 1, "a fork has one thread, whatever the others hold"
    statuses = [_forked(arguments, Point(**told) if told else None) for told in json.loads(points)]
    print(json.dumps(statuses))


def _forked(arguments: Sequence[str], point: Point | None) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.dup2(2, 1)
    print(f"-- {point.where if point else 'to the end'}", flush=True)
    sys.argv = ["corefit", *arguments]
    try:
        _start(point)
    except SystemExit as ended:
        sys.stdout.flush()
        os._exit(int(ended.code or 0))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def _start(point: Point | None) -> None:
    from corefit.cli import main as corefit

    if point:
        point.arm()
    corefit()


if __name__ == "__main__":
    main(*sys.argv[1:])
