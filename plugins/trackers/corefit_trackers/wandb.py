"""Weights & Biases: one run for all stages, online or as files that `wandb sync` uploads later."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from urllib.parse import urlparse

from attrs import define, field

from corefit.errors import ConfigError
from corefit_trackers.base import COLUMNS, Event, RunTracker
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

    _with_axis: set[str] = field(init=False, factory=set[str])
    """The stages whose charts have their own steps as axis."""

    def check(self) -> None:
        """Raise ConfigError if the package, or the key of an account, is missing."""
        super().check()
        if self._mode == "online" and not _has_key():
            raise ConfigError(
                "no key of Weights & Biases is there: run `wandb login`, set WANDB_API_KEY, or write "
                'mode = "offline" and send the files later with `wandb sync`'
            )

    @property
    def lasting(self) -> bool:
        """Whether what was sent outlives a kill: not in wandb's files, which it writes in blocks and at the end."""
        return self._mode == "online"

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
        self._with_axis = set()
        return tracker

    def more(self, event: Event) -> dict[str, Any]:
        """Return the stage's own step, which its charts have as axis, the sample grid, and the table."""
        import wandb

        name, found = event.name, dict[str, Any]({f"{event.name}/step": event.step})
        if event.grid:
            found[f"{name}/samples"] = wandb.Image(pixels(event.grid))
        if event.rows:
            found[f"{name}/table"] = wandb.Table(columns=[*COLUMNS], data=[[*row] for row in event.rows])
        return found

    def log(self, tracker: Any, values: dict[str, Any], step: int, event: Event) -> None:
        """Send all at once and for good: what wandb still waits to complete, a killed run would lose.

        wandb takes each number of a step once. Held-out scores of the last step follow its metrics, so they have the
        numbers in between.
        """
        if event.name not in self._with_axis:
            tracker.tracker.define_metric(f"{event.name}/*", step_metric=f"{event.name}/step")
            self._with_axis.add(event.name)
        tracker.log(values, step=2 * step + event.scored, commit=True)

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
