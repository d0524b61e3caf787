"""What happens in a run, told to observers, to run.json and to the page; on the main process only."""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define, field, frozen

from corefit.pipeline.pipeline import Pipeline, Stage
from corefit.plugins.observing import Observers
from corefit.run import report
from corefit.run.evaluation.evaluator import Evaluator
from corefit.run.record import Record
from corefit.system import energy, memory
from corefit.system.display import Advance, Display
from corefit.system.energy import EnergyMeter
from corefit.system.ranks import Ranks
from corefit.system.signals import Signals
from corefit.train.job import Cost, Listener, Metrics
from corefit.types import Backbone, Samples, TrainState

if TYPE_CHECKING:
    import torch


PAUSE, SHARE = 10.0, 0.005
"""Seconds after which report.html is written again, or later, so that it takes at most this share of the time."""


@define(eq=False)
class Page:
    """Keeps run.json and report.html up to date. Where that fails it is said once, and the run goes on."""

    folder: Path
    say: Callable[[str], None]
    record: Record
    _next: float = field(init=False, default=0.0)
    _failed: bool = field(init=False, default=False)

    def note(self) -> None:
        """Write what the record says now, and the page if it is time."""
        self._attempt(self.record.write)
        self.refresh()

    def refresh(self) -> None:
        """Write the page if it is time."""
        if time.monotonic() >= self._next:
            self.write()

    def write(self) -> None:
        """Write both."""
        started = time.monotonic()
        self._attempt(self.record.write)
        self._attempt(lambda: report.page(self.folder))
        ended = time.monotonic()
        self._next = ended + max(PAUSE, (ended - started) / SHARE)

    def _attempt(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:
            if not self._failed:
                problem = f"{type(error).__name__}: {error}".partition("\n")[0]
                self.say(f"run.json and report.html cannot be kept up to date ({problem}); the run goes on")
            self._failed = True


@define(eq=False)
class Events:
    """Tells observers what happens in one run, and writes run.json and the page; on the main process only.

    page  None before the run has started, and on other processes than the main one
    """

    pipeline: Pipeline
    ranks: Ranks
    display: Display
    observers: Observers = field(init=False)
    page: Page | None = field(init=False, default=None)

    def __attrs_post_init__(self) -> None:
        self.observers = Observers(self.pipeline.host, self.pipeline.observer, self.display.print)

    def tell(self, event: str, **arguments: Any) -> None:
        """Tell the observers."""
        if self.ranks.main:
            self.observers.tell(event, **arguments)

    def run_started(self, precision: str) -> None:
        """Tell that the run starts, in a computation of this precision; all processes call it."""
        device = self.ranks.device
        found = self.ranks.all_gather_object((_name(device), energy.gpu_id(device)))
        if self.ranks.main:
            meter = EnergyMeter.of([each for _, each in found])
            record = Record.start(self.pipeline, [name for name, _ in found], precision, meter)
            self.page = Page(self.pipeline.run_folder, self.display.print, record)
            self.page.write()
        self.tell("run_started", pipeline=self.pipeline, folder=self.pipeline.run_folder)

    def data_known(self, data: Mapping[str, Any], base_hash: str) -> None:
        """Note what the run knows after its data are encoded: how many they are, and a hash of the base's weights."""
        if self.page:
            content = self.page.record.content
            content["data"], content["base"]["hash"] = dict(data), base_hash
            self.page.note()

    def stage_is(self, name: str, state: str, cost: Cost | None = None, step: int | None = None) -> None:
        """Note that a stage is "training", "evaluating" or "done", and what its training took, if that is known."""
        if self.page:
            entry = self.page.record.stage(name)
            entry["state"] = state
            if cost and step is not None:
                self.page.record.trained(name, step, costs(cost))
            self.page.note()

    @contextmanager
    def ending(self) -> Generator[None]:
        """Tell how the block ends, if the run has started by then. An error of an observer hides no other error."""
        try:
            yield
        except BaseException as error:
            try:
                self._finish(error)
            except Exception as another:
                self.display.print(f"run_finished failed ({type(another).__name__}: {another})")
            raise
        self._finish(None)

    def _finish(self, error: BaseException | None) -> None:
        if self.page:
            self.page.record.end(error)
            self.page.write()
            self.tell("run_finished", pipeline=self.pipeline, folder=self.pipeline.run_folder, error=error)


def costs(cost: Cost) -> dict[str, float]:
    """Return what a stage's training took, as run.json names it."""
    return {
        "seconds": round(cost.seconds, 3),
        "samples_per_second": round(cost.samples_per_second, 3),
        "peak_memory": cost.peak_memory,
    }


@frozen(eq=False)
class StageEvents(Listener):
    """Passes the events of a stage's training on: to the progress bar, and on the main process to observers."""

    events: Events
    signals: Signals
    stage: Stage
    folder: Path
    backbone: Backbone
    evaluator: Evaluator | None
    progress: Advance
    ending: dict[str, Any] = field(factory=dict[str, Any])
    """The alarm that ended the stage, as done.json has it; empty if none did."""

    def stop_requested(self) -> bool:
        return self.signals.stop_requested

    def stepped(self, step: int, metrics: Metrics) -> None:
        self.progress(step, self.stage.steps, metrics)

    def started(self, step: int) -> None:
        if self.events.page:
            self.events.page.record.training(self.stage.name, step)
            self.events.page.note()
        self.tell("stage_started", step)

    def saved(self, step: int, path: Path) -> None:
        if self.events.page:
            self.events.page.note()
        self.tell("checkpoint_saved", step, path=path)

    def logged(self, step: int, metrics: Metrics) -> None:
        """Pass on metrics. Where one rank alone cannot, all ranks first generate the samples that are due."""
        sample, due = self._samples(), self.stage.samples(step)
        if self.evaluator and not sample and due:
            sample = _constant(self.evaluator.samples(self.backbone))
        if self.events.ranks.main:
            grid = grid_of(self.folder, step) if due and sample else None
            state = TrainState(step, self.folder, self.backbone, sample, grid)
            metrics = self.events.pipeline.host.step_metrics(self.stage, state, metrics)
            self.events.tell("step_finished", stage=self.stage, state=state, metrics=metrics)
            self._note(step, metrics)

    def _note(self, step: int, metrics: Metrics) -> None:
        """Note in run.json how far the training has come."""
        assert self.events.page is not None, "the run has started"
        seconds = metrics["seconds"]
        cost = Cost(seconds, self.stage.rows * step / max(seconds, 1e-9), memory.peak(self.events.ranks.device))
        self.events.page.record.trained(self.stage.name, step, costs(cost))
        self.events.page.refresh()

    @property
    def last_step(self) -> int:
        """The step that the stage ends with."""
        return self.ending["alarm"]["step"] if self.ending else self.stage.steps

    def finished(self) -> None:
        """Tell that the stage's weights are saved."""
        self.tell("stage_finished", self.last_step)

    def alarmed(self, text: str) -> None:
        """Say that a held-out reward falls while the trained one rises."""
        then = "; the stage ends here" if self.stage.ends_on_alarm else ""
        self.events.display.print(f"{self.folder.name}: alarm: {text}{then}")

    def ended(self, step: int, text: str) -> None:
        """Note that the stage ends early, for an alarm."""
        self.ending["alarm"] = {"step": step, "text": text}

    def tell(self, event: str, step: int, **rest: Any) -> None:
        """Tell of an event at a step of this stage."""
        state = TrainState(step, self.folder, self.backbone, self._samples())
        self.events.tell(event, stage=self.stage, state=state, **rest)

    def _samples(self) -> Samples | None:
        evaluator = self.evaluator
        if evaluator is None or self.events.ranks.forwards_together:
            return None
        return functools.cache(lambda: evaluator.samples(self.backbone))


def grid_of(folder: Path, step: int) -> Path:
    """Return where a stage's sample grid after `step` steps lies."""
    return folder / "samples" / f"step-{step:06d}.png"


def _constant(samples: Any) -> Samples:
    return lambda: samples


def _name(device: torch.device) -> str:
    """Return the name of a device, as people know it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
