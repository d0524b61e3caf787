"""The other trackers that accelerate keeps, for metrics alone."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attrs import define

from corefit_trackers.base import RunTracker, require

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker


@define(kw_only=True, slots=False)
class OtherTracker(RunTracker):
    """Sends metrics and held-out means to another of accelerate's trackers, which its own variables configure.

    A run that continues begins another run in the tracker, with the steps that are still to come.
    """

    tracker: Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab"]
    """The tracker, by the name of its package."""
    project: str = "corefit"
    """The project, or experiment, in the tracker."""

    @property
    def TRACKER(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The tracker's name in accelerate."""
        return self.tracker

    def check(self) -> None:
        """Raise ConfigError if the tracker's package is missing."""
        require(self.tracker, extra="")

    def start(self, name: str, id: str, folder: Path) -> GeneralTracker:
        """Start a run."""
        tracking: Any = importlib.import_module("accelerate.tracking")
        cls = tracking.LOGGER_TYPE_TO_CLASS[self.tracker]
        keys = {"logging_dir": str(folder)} if cls.requires_logging_directory else {}
        tracker: GeneralTracker = cls(self.project, **keys)
        tracker.start()
        return tracker
