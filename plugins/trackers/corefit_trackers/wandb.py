"""Weights & Biases: one run for all stages, online or as files that `wandb sync` uploads later."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from urllib.parse import urlparse

from attrs import define

from corefit.errors import ConfigError
from corefit.types import TrainState
from corefit.types.stage import Stage
from corefit_trackers.base import COLUMNS, Place, RunTracker
from corefit_trackers.tensorboard import pixels

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker


@define(kw_only=True, slots=False)
class Wandb(RunTracker):
    """Sends metrics, grids and tables to Weights & Biases. A run that continues goes on in the same run there.

    The key of the account is taken from where `wandb login` puts it, or from WANDB_API_KEY; it never stands in a
    pipeline file.
    """

    TRACKER: ClassVar[str] = "wandb"

    project: str = "corefit"
    """The project on Weights & Biases."""
    entity: str | None = None
    """The user or team that the project belongs to; by default the account's own."""
    mode: Literal["online", "offline"] | None = None
    """Whether to send at once, or to write files into the run's folder that `wandb sync` sends later. By default what
    the variable WANDB_MODE says, or else online."""

    def check(self) -> None:
        """Raise ConfigError if the package, or the key of an account, is missing."""
        super().check()
        if self._mode == "online" and not _has_key():
            raise ConfigError(
                "no key of Weights & Biases is there: run `wandb login`, set WANDB_API_KEY, or write "
                'mode = "offline" and send the files later with `wandb sync`'
            )

    @property
    def _mode(self) -> str:
        return self.mode or os.environ.get("WANDB_MODE") or "online"

    def start(self, name: str, id: str, folder: Path) -> GeneralTracker:
        """Start the run, or continue it."""
        import wandb
        from accelerate.tracking import WandBTracker

        keys: dict[str, Any] = {"entity": self.entity, "mode": self._mode, "dir": str(folder)}
        online = {"resume": "allow"} if self._mode == "online" else {}
        quiet = wandb.Settings(console="off", silent=True)  # the run's own lines and progress stay as they are
        tracker = WandBTracker(self.project, name=name, id=id, settings=quiet, **online, **keys)
        tracker.start()
        return tracker

    def step_finished(self, stage: Stage, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Send the stage's own step as well, which its charts have as axis."""
        super().step_finished(stage, state, {**metrics, "step": state.step})

    def place(self, name: str, folder: Path) -> Place:
        """Return the run's place, and let a stage's charts have its own steps as axis."""
        place = super().place(name, folder)
        tracker: Any = place.tracker
        tracker.tracker.define_metric(f"{name}/*", step_metric=f"{name}/step")
        return place

    def send_grid(self, place: Place, grid: Path, step: int) -> None:
        """Send a sample grid as an image."""
        tracker: Any = place.tracker
        tracker.log_images({f"{place.prefix}samples": [pixels(grid)]}, step=place.offset + step)

    def send_table(self, place: Place, rows: Sequence[Sequence[Any]], step: int) -> None:
        """Send held-out scores as a table."""
        tracker: Any = place.tracker
        columns, data = [*COLUMNS], [[*row] for row in rows]
        tracker.log_table(f"{place.prefix}eval", columns=columns, data=data, step=place.offset + step)

    def end(self, tracker: Any, error: BaseException | None) -> None:
        """End the run, as failed where an error ended it."""
        tracker.tracker.finish(exit_code=0 if error is None else 1)


def _has_key() -> bool:
    """Return whether an account's key is in the environment, or in the file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
