"""plugin_name, an observer for corefit: a line in a diary for what happens in a run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from attrs import define, field

from corefit import Observer, Offers, hookimpl

if TYPE_CHECKING:
    from corefit.types import PipelineView, Scored, TrainState
    from corefit.types.stage import Stage

COREFIT_API = "1.0"


@define
class PluginName(Observer):
    """Writes diary.txt into the run's folder: what happened and when, for people who follow it with `tail -f`."""

    optional: ClassVar[bool] = True  # a full disk ends the diary, and not the run

    metric: str = "loss"
    """The metric of training that is told at every logged step."""
    _folder: Path = field(init=False, factory=Path)

    def run_started(self, pipeline: PipelineView, folder: Path) -> None:
        self._folder = folder
        self._write(f"{pipeline.name} starts, or continues")

    def stage_started(self, stage: Stage, state: TrainState) -> None:
        self._write(f"{stage.name}: trains from step {state.step} to {stage.steps}")

    def step_finished(self, stage: Stage, state: TrainState, metrics: Mapping[str, float]) -> None:
        value = metrics.get(self.metric)  # none is there if all steps since the last logged one were skipped
        told = "" if value is None else f", {self.metric} {value:.4g}"
        self._write(f"{stage.name}: step {state.step} of {stage.steps}{told}")

    def scored(self, scored: Scored) -> None:
        if not scored.earlier:
            means = {name: sum(values) / len(values) for name, values in scored.values.items()}
            self._write(f"{scored.name}: scored, {', '.join(f'{name} {mean:.4g}' for name, mean in means.items())}")

    def run_finished(self, pipeline: PipelineView, folder: Path, error: BaseException | None) -> None:
        how = "is finished" if error is None else f"ends early: {type(error).__name__} {error}"
        self._write(f"{pipeline.name} {how}")

    def _write(self, what: str) -> None:
        with (self._folder / "diary.txt").open("a", encoding="utf-8") as diary:
            diary.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {what}\n")


@hookimpl
def corefit_observers() -> Offers[Observer]:
    return {"plugin_name": PluginName}
