"""Every hook. Offers are asked once, at start; observers are told what happened. None runs inside a step.

An offer returns names and attrs classes; a class's fields are the keys that its TOML table may set.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

if TYPE_CHECKING:
    from corefit.types import Backbone, NoiseWeighting, Reward, Sampler, Source, TrainState
    from corefit.types.objective import Objective
    from corefit.types.stage import Stage

API_VERSION = "1.0"
"""The version of what plugins are written against: hooks, protocols, the names in corefit. The first number changes
when one of them goes."""
T = TypeVar("T")
Offers = Mapping[str, type[T]]
"""Names, as `use = "..."` has them, and the attrs classes behind them."""

hookspec = pluggy.HookspecMarker("corefit")
hookimpl = pluggy.HookimplMarker("corefit")


@hookspec
def corefit_backbones() -> Offers[Backbone]:  # pyright: ignore[reportReturnType]
    """Offer backbones: how a model family is loaded, called and saved."""


@hookspec
def corefit_samplers() -> Offers[Sampler]:  # pyright: ignore[reportReturnType]
    """Offer samplers: how one step is taken."""


@hookspec
def corefit_noise_weightings() -> Offers[NoiseWeighting]:  # pyright: ignore[reportReturnType]
    """Offer noise weightings: which noise levels are supervised, and how much each counts."""


@hookspec
def corefit_objectives() -> Offers[Objective[Any]]:  # pyright: ignore[reportReturnType]
    """Offer objectives: what is learned."""


@hookspec
def corefit_rewards() -> Offers[Reward]:  # pyright: ignore[reportReturnType]
    """Offer rewards: scores of media."""


@hookspec
def corefit_sources() -> Offers[Source]:  # pyright: ignore[reportReturnType]
    """Offer sources: raw examples."""


@hookspec
def corefit_stage_started(stage: Stage, state: TrainState) -> None:
    """Observe that a stage is about to take its first step (also after a resume)."""


@hookspec
def corefit_step_metrics(stage: Stage, state: TrainState, metrics: Mapping[str, float]) -> Mapping[str, float]:  # pyright: ignore[reportReturnType]
    """Add numbers of one's own to a logged step; they are logged, drawn and shown as the objective's are."""


@hookspec
def corefit_step_finished(stage: Stage, state: TrainState, metrics: Mapping[str, float]) -> None:
    """Observe a logged step: means over all ranks since the last logged one."""


@hookspec
def corefit_checkpoint_saved(stage: Stage, state: TrainState, path: Path) -> None:
    """Observe that `path` is a complete checkpoint."""


@hookspec
def corefit_stage_finished(stage: Stage, state: TrainState) -> None:
    """Observe that a stage's weights are final and saved in `state.folder / "model"`."""
