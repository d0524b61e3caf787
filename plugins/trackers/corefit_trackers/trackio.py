"""trackio: Hugging Face's tracker, whose data lie on this machine or in a Space."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import define

from corefit_trackers.base import Event, RunTracker, require

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker


@define(kw_only=True, slots=False)
class Trackio(RunTracker):
    """Sends metrics and grids to trackio. A run that continues goes on in the same run there.

    trackio needs a newer huggingface-hub than the transformers that corefit is tested with, so this class is tested on
    a stand-in of its functions alone.
    """

    TRACKER: ClassVar[str] = "trackio"

    project: str = "corefit"
    """The project in trackio."""
    space: str | None = None
    """The Space on the hub, as "user/name", that holds the data; by default they stay on this machine."""

    def check(self) -> None:
        """Raise ConfigError if the package is missing."""
        require(self.TRACKER, extra="")

    def start(self, name: str, id: str, folder: Path) -> GeneralTracker:
        """Start the run, or continue it; trackio knows a run by its name."""
        from accelerate.tracking import TrackioTracker

        tracker = TrackioTracker(self.project, name=f"{name}-{id}", resume="allow", space_id=self.space)
        tracker.start()
        return tracker

    def more(self, event: Event) -> dict[str, Any]:
        """Return the sample grid."""
        if event.grid is None:
            return {}
        trackio: Any = importlib.import_module("trackio")
        return {f"{event.name}/samples": trackio.Image(str(event.grid))}

    def log(self, tracker: Any, values: dict[str, Any], step: int, event: Event) -> None:
        """Log to trackio's own run, for accelerate before 1.15 keeps the step to itself."""
        tracker.tracker.log(values, step=step)
