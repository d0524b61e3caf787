"""A pipeline whose first stage has a held-out reward, as a user runs it: logged, told, ended, killed and resumed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import forks
import pytest
import torch
from conftest import Project
from processes import two, weights

ARMED = Path(__file__).parents[1] / "faults" / "armed.py"
OWN = '''\
"""A reward with a gradient, and what it must not be exploited for."""

from __future__ import annotations

from typing import ClassVar

from attrs import frozen

from corefit import Reward, hookimpl


@frozen
class Red(Reward):
    """How red a picture is."""

    differentiable: ClassVar[bool] = True

    def score(self, media, prompts, meta):
        return media[:, 0].flatten(1).mean(1) - media[:, 1:].flatten(1).mean(1)


@frozen
class Blue(Reward):
    """How blue a picture is, in a thread."""

    concurrent: ClassVar[bool] = True
    offset: float = 0.0

    def score(self, media, prompts, meta):
        return self.offset + (media[:, 2] - media[:, 0]).flatten(1).mean(1)


@hookimpl
def corefit_rewards():
    return {"red": Red, "blue": Blue}
'''
PIPELINE = """\
name = "run"
plugins = ["own.py"]
precision = "fp32"

[backbone]
use = "sd3"
path = "base"
max_sequence_length = 16

[data]
source = { use = "jsonl", path = "train.jsonl" }
size = [16, 16]

[[stage]]
name = "red"
steps = 16
batch = 4
checkpoint_every = 4
log_every = 1
objective = { use = "reward_gradient", method = "refl", steps = 3, guidance = 1.0 }
reward = [{ use = "red" }]
held_out = [{ use = "blue" }]
optimizer = { lr = 1e-3 }

[stage.alarm]
window = 10
threshold = 3.0
stop = true

[[stage]]
name = "sft"
steps = 1
batch = 4
objective = { use = "sft" }
"""


@pytest.fixture
def exploited(project: Project) -> Project:
    (project.folder / "own.py").write_text(OWN)
    project.write(PIPELINE)
    return project


def ran(project: Project, *settings: str) -> tuple[Path, str]:
    done = project.main("run", "pipeline.toml", *(word for key in settings for word in ("--set", key)))
    assert done.status == 0, done.err
    return project.folder / "runs/run", done.err + done.out


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "01-red/metrics.jsonl").read_text().splitlines()]


def same(one: Path, other: Path) -> None:
    """Both stages have the same weights and, but for the clock, the same log, and ended in the same step."""
    for stage in ("01-red", "02-sft"):
        a, b = weights(one / stage), weights(other / stage)
        assert a
        assert all(torch.equal(a[name], b[name]) for name in a)
    clock = {"seconds", "samples_per_second"}
    a, b = ([{k: v for k, v in line.items() if k not in clock} for line in lines(run)] for run in (one, other))
    assert a == b
    a, b = (json.loads((run / "01-red/done.json").read_text()) for run in (one, other))
    assert a["alarm"] == b["alarm"]


def test_an_alarm_ends_the_stage_and_the_pipeline_goes_on(exploited):
    run, said = ran(exploited)
    logged = lines(run)
    last = len(logged)
    assert 10 <= last < 16
    assert [line["step"] for line in logged if "alarm" in line] == [last]
    assert logged[-1]["alarm"] == 1.0
    assert all("held_out/blue" in line and "reward" in line for line in logged)
    assert "01-red: alarm: held_out/blue fell from " in said
    assert "the stage ends here" in said
    done = json.loads((run / "01-red/done.json").read_text())
    assert done["finished"]
    assert done["alarm"]["step"] == last
    assert done["alarm"]["text"] in said.replace("\n", " ")
    assert weights(run / "02-sft")

    planned = exploited.main("run", "pipeline.toml", "--dry-run")
    assert f"ended by its alarm after step {last} of 16" in planned.out
    before = exploited.tree()
    _, again = ran(exploited)
    assert "red: finished before, used as it is" in again
    assert exploited.tree()["runs/run/01-red/done.json"] == before["runs/run/01-red/done.json"]

    exploited.write(PIPELINE.replace("steps = 16", f"steps = {last}").replace("stop = true", "stop = false"))
    shorter, said = ran(exploited, "name='shorter'")
    shorter = shorter.with_name("shorter")
    assert "the stage ends here" not in said
    a, b = weights(run / "01-red"), weights(shorter / "01-red")
    assert all(torch.equal(a[name], b[name]) for name in a)


KILLS = (
    {"where": "before the step that sounds", "target": "corefit.train.checkpoint:save", "after": True},
    {"where": "as the alarm is logged", "target": "corefit.run.events:StageEvents.alarmed"},
    {"where": "as the ended stage is saved", "target": "corefit.train.weights:save"},
    {"where": "before done.json says so", "target": "corefit.run.plan:write_done", "call": 2},
)


def test_kills_at_any_point_leave_the_same_bytes(exploited):
    ran(exploited, "name='whole'")
    for point in KILLS:
        words = ("run", "pipeline.toml", "--set", "name='killed'")
        start = forks.start(str(ARMED), json.dumps(point), *words, cwd=exploited.folder)
        assert start.wait() == -signal.SIGKILL, (point, start.communicate()[1])
    ran(exploited, "name='killed'")
    runs = exploited.folder / "runs"
    same(runs / "whole", runs / "killed")


def test_two_processes_end_in_the_same_step(exploited):
    ran(exploited, "name='one'")
    done = two(exploited, "run", "pipeline.toml", "--set", "name='two'")
    assert done.status == 0, done.err
    runs = exploited.folder / "runs"
    one, both = (json.loads((runs / name / "01-red/done.json").read_text())["alarm"] for name in ("one", "two"))
    assert one["step"] == both["step"]
    assert weights(runs / "two/02-sft")
