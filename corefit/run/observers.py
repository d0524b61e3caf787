"""corefit's own observers, a plugin like any other: they write metrics.jsonl, its curves and the sample grids."""

from __future__ import annotations

from collections.abc import Mapping

from corefit.plugins.hookspecs import hookimpl
from corefit.run.report import MetricsLog, curves, grid
from corefit.types import TrainState
from corefit.types.stage import Stage


@hookimpl
def corefit_stage_started(stage: Stage, state: TrainState) -> None:
    """Drop the lines of metrics.jsonl that a resumed stage will write again."""
    _log(state).truncate_after(state.step)


@hookimpl
def corefit_step_finished(stage: Stage, state: TrainState, metrics: Mapping[str, float]) -> None:
    _log(state).append(state.step, metrics)
    if state.grid and state.sample:
        prompts, media = state.sample()
        grid(media, prompts, state.grid)


@hookimpl
def corefit_stage_finished(stage: Stage, state: TrainState) -> None:
    """Draw the curves. The last sample grid is drawn by the evaluation, which generates the samples anyway."""
    log = state.folder / "metrics.jsonl"
    if log.exists():
        curves(log, state.folder / "metrics.png")


def _log(state: TrainState) -> MetricsLog:
    return MetricsLog(state.folder / "metrics.jsonl")
