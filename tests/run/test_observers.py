"""Observers are told of a whole run, run.json and the page are there from the start, and nothing of it costs a run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import forks
import pytest
from attrs import define
from conftest import Project

from corefit import Observer, hookimpl
from corefit.plugins import Host
from corefit.plugins.observing import Observers
from corefit.run import events, record
from corefit.run.events import Page
from corefit.system.energy import EnergyMeter

TOLD = '''\
"""An observer that writes what it is told, in a local file."""

import os
import signal
from typing import ClassVar

from attrs import define, field

from corefit import Observer, hookimpl


@define
class Told(Observer):
    path: str
    fails_at: str = ""
    signal_at: str = ""
    signal: int = signal.SIGKILL
    _file: object = field(init=False, default=None)

    def _tell(self, *words):
        line = " ".join(map(str, words))
        with open(self.path, "a") as file:
            file.write(line + "\\n")
        if line == self.fails_at:
            raise RuntimeError("no paper left")
        if line == self.signal_at:
            os.kill(os.getpid(), self.signal)

    def run_started(self, pipeline, folder):
        self._tell("run", pipeline.name, (folder / "run.json").exists(), (folder / "report.html").exists())

    def stage_started(self, stage, state):
        self._tell("stage", stage.name, state.step)

    def step_finished(self, stage, state, metrics):
        self._tell("step", stage.name, state.step, state.grid and state.grid.name, state.grid and state.grid.exists())
        if state.grid:
            assert state.sample() is state.sample(), "generated once, whoever asks"

    def checkpoint_saved(self, stage, state, path):
        self._tell("checkpoint", path.name)

    def stage_finished(self, stage, state):
        self._tell("trained", stage.name, (state.folder / "model").exists())

    def scored(self, scored):
        shown = scored.samples and (len(scored.samples[0]), *scored.samples[1].shape)
        self._tell("scored", scored.name, scored.step, sorted(scored.values), len(scored.rows), shown, scored.earlier)

    def run_finished(self, pipeline, folder, error):
        self._tell("end", pipeline.name, type(error).__name__, error)


@define
class Careless(Told):
    optional: ClassVar[bool] = True


@hookimpl
def corefit_observers():
    return {"told": Told, "careless": Careless}


@hookimpl
def corefit_run_started(pipeline, folder):
    print("hook: run", pipeline.name)


@hookimpl
def corefit_run_finished(error):
    print("hook: end", error)
'''
SOAR = ("stage.soar.steps=4", "stage.soar.log_every=1", "stage.soar.sample_every=2", "stage.soar.checkpoint_every=2")


@pytest.fixture
def told(project: Project) -> Project:
    """The pipeline with an observer, in a local file, that writes to told.txt."""
    (project.folder / "told.py").write_text(TOLD)
    text = project.text.replace('["bright.py"]', '["bright.py", "told.py"]')
    stage = text.index('[[stage]]\nname = "grpo"')
    project.write(text[:stage] + '[[observer]]\nuse = "told"\npath = "told.txt"\n\n' + text[text.index("[eval]") :])
    return project


def run(project: Project, *settings: str, status: int = 0) -> tuple[list[str], Any]:
    """Run the pipeline; the lines of the observer, and how the command ended."""
    (project.folder / "told.txt").unlink(missing_ok=True)
    keys = (f"observer.told.path={str(project.folder / 'told.txt')!r}", *SOAR, *settings)
    ended = project.main("run", "pipeline.toml", *(word for key in keys for word in ("--set", key)))
    assert ended.status == status, ended.err
    return (project.folder / "told.txt").read_text().splitlines(), ended


def run_json(project: Project) -> dict[str, Any]:
    return json.loads((project.folder / "runs/tiny/run.json").read_text())


def test_it_is_told_of_a_run_and_of_one_that_has_nothing_left_to_do(told: Project):
    lines, ended = run(told, "eval.samples=3")
    assert lines == [
        "run tiny True True",
        "scored base 0 ['bright'] 3 (3, 3, 3, 16, 16) False",
        "stage soar 0",
        "step soar 1 None None",
        "step soar 2 step-000002.png True",
        "checkpoint step-000002",
        "step soar 3 None None",
        "step soar 4 None None",
        "checkpoint step-000004",
        "trained soar True",
        "scored soar 4 ['bright'] 3 (3, 3, 3, 16, 16) False",
        "end tiny NoneType None",
    ]
    assert "hook: run tiny\n" in ended.out
    assert "hook: end None\n" in ended.out
    samples = told.folder / "runs/tiny/01-soar/samples"
    assert (samples / "step-000004.png").read_bytes() == (samples / "last.png").read_bytes()
    lines, _ = run(told, "eval.samples=3")
    assert lines == [
        "run tiny True True",
        "scored base 0 ['bright'] 3 None True",
        "scored soar 4 ['bright'] 3 None True",
        "end tiny NoneType None",
    ]


def test_samples_are_generated_once_for_all_that_show_them(told: Project, monkeypatch: pytest.MonkeyPatch):
    """Twice for two evaluations of the 4 prompts, and once for the one grid within training; no other is shown."""
    from corefit.run.evaluation.evaluator import Evaluator

    generated: list[int] = []
    media = Evaluator.media

    def counted(self: Evaluator, backbone: Any, rows: Any, *rest: Any) -> Any:
        generated.append(len(rows))
        return media(self, backbone, rows, *rest)

    monkeypatch.setattr(Evaluator, "media", counted)
    run(told, "eval.samples=4")
    assert generated == [4, 4, 4]


@pytest.mark.parametrize("at", ["step soar 2 step-000002.png True", "run tiny True True", "end tiny NoneType None"])
def test_an_exception_of_an_optional_observer_is_said_once(told: Project, at: str):
    told.swap(('use = "told"', 'use = "careless"'))
    keys = (f"observer.careless.path={str(told.folder / 'told.txt')!r}", f"observer.careless.fails_at={at!r}", *SOAR)
    ended = told.main("run", "pipeline.toml", *(word for key in keys for word in ("--set", key)))
    assert ended.status == 0, ended.err
    event = {"step": "step_finished", "run": "run_started", "end": "run_finished"}[at.split()[0]]
    said = f"observer careless: {event} failed (RuntimeError: no paper left); the run goes on without this observer"
    assert ended.out.count(said) == 1
    assert (told.folder / "told.txt").read_text().splitlines()[-1] == at
    assert run_json(told)["status"] == "finished"


def test_an_exception_of_another_observer_ends_the_run(told: Project):
    """It is told of its own failure, and the page says what became of the run."""
    lines: list[str] = []
    with pytest.raises(RuntimeError, match="no paper left"):
        run(told, "observer.told.fails_at='stage soar 0'")
    lines = (told.folder / "told.txt").read_text().splitlines()
    assert lines[-2:] == ["stage soar 0", "end tiny RuntimeError no paper left"]
    said = run_json(told)
    assert (said["status"], said["error"]) == ("failed", "RuntimeError: no paper left")
    assert [stage["state"] for stage in said["stages"]] == ["training"]
    run(told)
    again = run_json(told)
    assert (again["status"], again["error"], again["started"]) == ("finished", None, said["started"])
    assert again["continued"] >= again["started"]


def test_hooks_are_called_before_the_observers_that_are_named():
    order: list[str] = []

    class Plugin:
        @hookimpl
        def corefit_run_started(self, folder: Path) -> None:
            order.append("hook")

    @define
    class Named(Observer):
        def run_started(self, pipeline: Any, folder: Path) -> None:
            order.append("observer")

    observers = Observers(Host(plugins=[Plugin()]), [Named()], order.append)
    observers.tell("run_started", pipeline=None, folder=Path())
    observers.tell("scored", scored=None)
    assert order == ["hook", "observer"]


# run.json and the page


def test_run_json_says_what_a_run_is(told: Project):
    run(told)
    said = run_json(told)
    assert (said["name"], said["status"], said["precision"], said["seed"]) == ("tiny", "finished", "fp32", 0)
    assert said["data"] == {"examples": 8, "prompts": 4, "duplicates": 0}
    assert said["base"]["name"] == "base"
    assert len(said["base"]["hash"]) == 16
    assert {"corefit", "python", "torch", "diffusers"} <= said["versions"].keys()
    assert len(said["devices"]) == said["processes"] == 1
    (stage,) = said["stages"]
    assert (stage["name"], stage["folder"], stage["start"]) == ("soar", "01-soar", "base")
    assert (stage["step"], stage["steps"], stage["state"]) == (4, 4, "done")
    assert stage["seconds"] > 0
    assert stage["samples_per_second"] == pytest.approx(16 / stage["seconds"], rel=0.01)
    assert stage["peak_memory"] > 1e6
    assert str(told.folder) not in (told.folder / "runs/tiny/run.json").read_text()
    run(told)
    (again,) = run_json(told)["stages"]
    assert again == stage, "a finished stage keeps what it took"


def test_a_signal_is_no_failure(told: Project):
    lines, _ = run(told, "observer.told.signal_at='step soar 3 None None'", "observer.told.signal=15", status=130)
    assert lines[-1] == "end tiny Stopped stopped after step 3"
    said = run_json(told)
    assert (said["status"], said["error"]) == ("stopped", None)
    assert said["stages"][0]["step"] == 3


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [(event.step, round(event.value, 6)) for event in EventAccumulator(str(folder)).Reload().Scalars(tag)]


def test_a_killed_run_has_a_page_and_its_tracker_no_point_twice(told: Project):
    told.swap(('use = "told"', 'use = "tensorboard"\n\n[[observer]]\nuse = "told"'))
    settings = (f"observer.told.path={str(told.folder / 'told.txt')!r}", *SOAR)
    command = ["-m", "corefit", "run", "pipeline.toml", *(word for key in settings for word in ("--set", key))]
    killed = forks.start(*command, "--set", "observer.told.signal_at='step soar 3 None None'", cwd=told.folder)
    assert killed.wait() == -9
    said = run_json(told)
    assert (said["status"], said["stages"][0]["state"], said["stages"][0]["step"]) == ("running", "training", 2)
    folder = told.folder / "runs/tiny"
    assert (folder / "report.html").stat().st_size > 1000
    assert [row["stage"] for row in json.loads((folder / "results.json").read_text())] == ["base"] * 3
    assert [step for step, _ in scalars(folder / "tensorboard/01-soar", "loss")] == [1, 2, 3]
    ended = forks.start(*command, cwd=told.folder)
    assert ended.wait() == 0, ended.communicate()
    written = [json.loads(line) for line in (folder / "01-soar/metrics.jsonl").read_text().splitlines()]
    shown = scalars(folder / "tensorboard/01-soar", "loss")
    assert [step for step, _ in shown] == [line["step"] for line in written] == [1, 2, 3, 4]
    assert [loss for _, loss in shown] == pytest.approx([line["loss"] for line in written], abs=1e-6)
    assert len(scalars(folder / "tensorboard/00-base", "eval/bright")) == 1
    assert run_json(told)["status"] == "finished"


def test_a_page_that_cannot_be_written_is_said_once_and_costs_no_run(told: Project, monkeypatch: pytest.MonkeyPatch):
    def broken(folder: Path) -> None:
        raise OSError("no ink")

    monkeypatch.setattr("corefit.run.report.page", broken)
    monkeypatch.setattr(events, "PAUSE", 0.0)
    monkeypatch.setattr(events, "SHARE", 1.0)
    _, ended = run(told)
    said = "run.json and report.html cannot be kept up to date (OSError: no ink); the run goes on"
    assert ended.out.count(said) == 1
    assert run_json(told)["status"] == "finished"


def test_the_page_takes_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A page that takes 1 s is written every 201 s, one that takes 10 ms every 10 s."""
    clock, written, slow = [0.0], list[float](), [1.0]

    def page(folder: Path) -> None:
        written.append(clock[0])
        clock[0] += slow[0]

    monkeypatch.setattr(events, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr("corefit.run.report.page", page)
    kept: Any = SimpleNamespace(write=lambda: None)
    shown = Page(tmp_path, pytest.fail, kept)
    for duration, expected in ((1.0, [0, 201]), (0.01, [402, 412, 422])):
        slow[0], start = duration, len(written)
        while len(written) - start < len(expected):
            shown.refresh()
            clock[0] += 0.25
        assert [round(at) for at in written[start:]] == expected


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/me/p/train.jsonl: line 3: no prompt", "train.jsonl: line 3: no prompt"),
        ("see '/home/my data/c' and https://host/x/y, a/b/c, 1/2", "see 'my data/c' and https://host/x/y, a/b/c, 1/2"),
        ("(/data/x.png)", "(x.png)"),
    ],
)
def test_messages_lose_their_absolute_paths(text: str, left: str):
    assert record.without_paths(text) == left


def test_the_commit_of_a_checkout_is_told(tmp_path: Path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    assert record._commit(tmp_path) is None
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert record._commit(tmp_path) == head
    (tmp_path / "file").write_text("2")
    assert record._commit(tmp_path) == f"{head}-dirty"
    assert record._commit(tmp_path / "absent") is None


class Nvml(ModuleType):
    """Stands in for NVIDIA's library, with two GPUs that have used 5 and 7 kJ."""

    class NVMLError(Exception):
        pass

    used: Mapping[str, int] = {"GPU-a": 5_000_000, "GPU-b": 7_000_000}

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.used:
            raise self.NVMLError
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: str) -> int:
        return self.used[gpu]


def test_energy_is_what_all_gpus_used_together(monkeypatch: pytest.MonkeyPatch, told: Project):
    library = Nvml("pynvml")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "pynvml", library)
    meter = EnergyMeter.of(["GPU-b", "GPU-a", "GPU-b"])
    assert meter is not None
    assert meter.joules() == 12_000
    for unknown in (["GPU-a", "GPU-c"], ["GPU-a", ""], []):
        assert EnergyMeter.of(unknown) is None
    content = {"stages": [{"name": "soar", "step": 0, "energy_joules": 99.0}]}
    kept = record.Record(told.folder / "run.json", content, meter)
    kept.training("soar", 0)
    library.used = {"GPU-a": 6_000_000, "GPU-b": 7_500_000}
    kept.trained("soar", 2, {"seconds": 1.0})
    (stage,) = content["stages"]
    assert stage == {"name": "soar", "step": 2, "state": "training", "seconds": 1.0, "energy_joules": 1500}
    kept.training("soar", 1)
    library.used = {"GPU-a": 6_000_000, "GPU-b": 8_500_000}
    kept.trained("soar", 2, {"seconds": 1.0})
    assert stage["energy_joules"] == 2500, "steps that are taken again have used theirs twice"
