"""What happens in a run, told to observers, to run.json and to the page; on the main process only."""

from __future__ import annotations

import functools
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import define, field, frozen

from corefit.pipeline.pipeline import Pipeline, Stage
from corefit.plugins.observing import Observers
from corefit.run.evaluate import Evaluator
from corefit.system.display import Advance, Display
from corefit.system.ranks import Ranks
from corefit.system.signals import Signals
from corefit.train import weights
from corefit.train.job import Listener, Metrics
from corefit.types import Backbone, Samples, TrainState


@define(eq=False)
class Events:
    """Tells what happens in one run. On other processes than the main one nothing is told."""

    pipeline: Pipeline
    ranks: Ranks
    display: Display
    observers: Observers = field(init=False)
    _started: bool = field(init=False, default=False)

    def __attrs_post_init__(self) -> None:
        self.observers = Observers(self.pipeline.host, self.pipeline.observer, self.display.print)

    def tell(self, event: str, **arguments: Any) -> None:
        """Tell the observers."""
        if self.ranks.main:
            self.observers.tell(event, **arguments)

    def run_started(self) -> None:
        """Tell that the run starts."""
        self._started = True
        self.tell("run_started", pipeline=self.pipeline, folder=self.pipeline.run_folder)

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
        if self._started:
            self.tell("run_finished", pipeline=self.pipeline, folder=self.pipeline.run_folder, error=error)


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

    def stop_requested(self) -> bool:
        return self.signals.stop_requested

    def stepped(self, step: int, metrics: Metrics) -> None:
        self.progress(step, self.stage.steps, metrics)

    def started(self, step: int) -> None:
        self.tell("stage_started", step)

    def saved(self, step: int, path: Path) -> None:
        self.tell("checkpoint_saved", step, path=path)

    def logged(self, step: int, metrics: Metrics) -> None:
        """Pass on metrics. With sharded weights all ranks first generate the samples that are due: one alone cannot."""
        sample, due = self._samples(), self.stage.samples(step)
        if self.evaluator and not sample and due:
            sample = _constant(self.evaluator.samples(self.backbone))
        if self.events.ranks.main:
            grid = grid_of(self.folder, step) if due and sample else None
            state = TrainState(step, self.folder, self.backbone, sample, grid)
            metrics = self.events.pipeline.host.step_metrics(self.stage, state, metrics)
            self.events.tell("step_finished", stage=self.stage, state=state, metrics=metrics)

    def finished(self) -> None:
        """Tell that the stage's weights are saved."""
        self.tell("stage_finished", self.stage.steps)

    def tell(self, event: str, step: int, **rest: Any) -> None:
        """Tell of an event at a step of this stage."""
        state = TrainState(step, self.folder, self.backbone, self._samples())
        self.events.tell(event, stage=self.stage, state=state, **rest)

    def _samples(self) -> Samples | None:
        evaluator = self.evaluator
        if evaluator is None or weights.is_sharded(self.backbone.transformer):
            return None
        return functools.cache(lambda: evaluator.samples(self.backbone))


def grid_of(folder: Path, step: int) -> Path:
    """Return where a stage's sample grid after `step` steps lies."""
    return folder / "samples" / f"step-{step:06d}.png"


def _constant(samples: Any) -> Samples:
    return lambda: samples
