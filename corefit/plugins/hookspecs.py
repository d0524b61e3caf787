"""All hooks. Hooks that offer classes are called once, at start; observers are called while stages run.

No hook runs inside a training step. A hook that offers returns a mapping of names to attrs classes; the fields of a
class are the keys of its TOML table.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

if TYPE_CHECKING:
    from corefit.types import (
        Backbone,
        NoiseWeighting,
        Observer,
        Optimizer,
        PipelineView,
        Reward,
        Sampler,
        Scored,
        Source,
        TrainState,
    )
    from corefit.types.objective import Objective
    from corefit.types.stage import Stage

API_VERSION = "1.0"
"""The version of the hooks, protocols and public names that plugins are written for. The major version changes when one
of them is removed."""
T = TypeVar("T")
Offers = Mapping[str, type[T]]
"""Maps names, as in `use = "name"`, to attrs classes."""

hookspec = pluggy.HookspecMarker("corefit")
hookimpl = pluggy.HookimplMarker("corefit")


@hookspec
def corefit_backbones() -> Offers[Backbone]:  # pyright: ignore[reportReturnType]
    """Offer backbones, which load, call and save a model family."""


@hookspec
def corefit_samplers() -> Offers[Sampler]:  # pyright: ignore[reportReturnType]
    """Offer samplers, which take one step of a rollout."""


@hookspec
def corefit_noise_weightings() -> Offers[NoiseWeighting]:  # pyright: ignore[reportReturnType]
    """Offer noise weightings, which draw the noise levels of training and weight the loss at each."""


@hookspec
def corefit_objectives() -> Offers[Objective[Any]]:  # pyright: ignore[reportReturnType]
    """Offer objectives, which define what is learned."""


@hookspec
def corefit_rewards() -> Offers[Reward]:  # pyright: ignore[reportReturnType]
    """Offer rewards, which score media."""


@hookspec
def corefit_sources() -> Offers[Source]:  # pyright: ignore[reportReturnType]
    """Offer sources, which read raw examples."""


@hookspec
def corefit_observers() -> Offers[Observer]:  # pyright: ignore[reportReturnType]
    """Offer observers, which a pipeline names in `[[observer]]` and which are told what happens in a run."""


@hookspec
def corefit_optimizers() -> Offers[Optimizer]:  # pyright: ignore[reportReturnType]
    """Offer optimizers, which take the steps of training."""


@hookspec
def corefit_run_started(pipeline: PipelineView, folder: Path) -> None:
    """Observe that a run starts, or continues, in `folder`."""


@hookspec
def corefit_stage_started(stage: Stage, state: TrainState) -> None:
    """Observe that a stage is about to train; called again when it resumes."""


@hookspec
def corefit_step_metrics(stage: Stage, state: TrainState, metrics: Mapping[str, float]) -> Mapping[str, float]:  # pyright: ignore[reportReturnType]
    """Return more metrics for a logged step; they are logged and plotted like those of the objective."""


@hookspec
def corefit_step_finished(stage: Stage, state: TrainState, metrics: Mapping[str, float]) -> None:
    """Observe a logged step; the metrics are means over all ranks and over the steps since the last logged one."""


@hookspec
def corefit_checkpoint_saved(stage: Stage, state: TrainState, path: Path) -> None:
    """Observe that a checkpoint was saved; `path` is complete."""


@hookspec
def corefit_stage_finished(stage: Stage, state: TrainState) -> None:
    """Observe that a stage's weights are final and saved in `state.folder / "model"`."""


@hookspec
def corefit_scored(scored: Scored) -> None:
    """Observe that the base model, or what a stage left, was evaluated."""


@hookspec
def corefit_run_finished(pipeline: PipelineView, folder: Path, error: BaseException | None) -> None:
    """Observe that a run ends; `error` is why it ends early, a KeyboardInterrupt where a signal stopped it."""
