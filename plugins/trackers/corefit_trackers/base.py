"""What all trackers share: what they are sent, under which names and at which steps, and nothing twice."""

from __future__ import annotations

import importlib.util
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import define, field, frozen

from corefit import Observer
from corefit.errors import ConfigError
from corefit.types import PipelineView, Scored, TrainState
from corefit.types.stage import Stage
from corefit_trackers.sent import Sent, SentRun, digest

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

Plain = str | int | float | bool
COLUMNS = ("metric", "category", "value", "low", "high", "n", "gain", "gain_low", "gain_high")
"""The columns of a table of held-out scores, as in results.json."""


@frozen(eq=False)
class Place:
    """Where the events of a stage go: a tracker of accelerate, what names begin with, and the first step's number."""

    tracker: GeneralTracker
    prefix: str = ""
    offset: int = 0

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers; those that are not finite are left out."""
        finite = {self.prefix + name: value for name, value in values.items() if math.isfinite(value)}
        self.tracker.log(finite, step=self.offset + step)


@define(kw_only=True, slots=False)
class Tracker(Observer):
    """Sends logged metrics, sample grids and held-out scores to a tracker of accelerate.

    A tracker that fails is left out for the rest of the run: it must not cost the run.
    """

    optional: ClassVar[bool] = True
    TRACKER: ClassVar[str]
    """The tracker's name in accelerate, and in the names of the notes of what was sent."""

    @abstractmethod
    def place(self, name: str, folder: Path) -> Place:
        """Return where the events of the base or of a stage go; its tracker is started if it is not."""
        ...

    @abstractmethod
    def sent(self, folder: Path) -> Sent:
        """Return what was sent of the base, or of the stage, that has this folder."""
        ...

    def check(self) -> None:
        """Raise ConfigError if the tracker's package is missing."""
        require(self.TRACKER)

    def step_finished(self, stage: Stage, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Send the metrics of a logged step, and the sample grid where one was drawn."""
        sent = self.sent(state.folder)
        if state.step > sent.step:
            place = self.place(stage.name, state.folder)
            place.log(metrics, state.step)
            if state.grid and state.grid.exists():
                self.send_grid(place, state.grid, state.step)
            sent.step = state.step
            sent.write()

    def scored(self, scored: Scored) -> None:
        """Send held-out means, their table and the samples, unless they were sent before."""
        sent = self.sent(scored.folder)
        if digest(scored) != sent.scores:
            place = self.place(scored.name, scored.folder)
            place.log(dict(_means(scored.rows)), scored.step)
            if scored.rows:
                self.send_table(place, [[row.get(name) for name in COLUMNS] for row in scored.rows], scored.step)
            if scored.grid and scored.grid.exists():
                self.send_grid(place, scored.grid, scored.step)
            sent.scores = digest(scored)
            sent.write()

    def send_grid(self, place: Place, grid: Path, step: int) -> None:
        """Send a sample grid, a PNG. Trackers that take no pictures do nothing."""

    def send_table(self, place: Place, rows: Sequence[Sequence[Any]], step: int) -> None:
        """Send rows of COLUMNS. Trackers that take no tables do nothing."""


@define(kw_only=True, slots=False)
class RunTracker(Tracker):
    """A tracker that has one run for all stages: their names stand before those of metrics, their steps add up."""

    _run: SentRun = field(init=False)
    _tracker: Any = field(init=False, default=None)
    """The tracker of accelerate, once something was sent."""
    _offsets: Mapping[str, int] = field(init=False, factory=dict[str, int])
    """How many steps the stages before each stage have."""
    _pipeline: PipelineView = field(init=False)

    @abstractmethod
    def start(self, name: str, id: str, folder: Path) -> GeneralTracker:
        """Return the tracker, started, of the run `id`, which is continued if the tracker knows it.

        name    the pipeline's name
        folder  the run's folder
        """
        ...

    def run_started(self, pipeline: PipelineView, folder: Path) -> None:
        """Look up which run of the tracker the folder belongs to."""
        self._pipeline, self._run, self._tracker = pipeline, SentRun.read(folder / self._note), None
        steps = [stage.steps for stage in pipeline.stage]
        self._offsets = {stage.name: sum(steps[:number]) for number, stage in enumerate(pipeline.stage)}

    def stage_started(self, stage: Stage, state: TrainState) -> None:
        """Begin another run of the tracker if the stage is another one than that of which metrics were sent."""
        run = self._run.entered(state.folder, state.folder / self._note)
        if run.id != self._run.id and self._tracker:
            self.end(self._tracker, None)
            self._tracker = None
        self._run = run

    def place(self, name: str, folder: Path) -> Place:
        """Return the run's place, with the stage's name as prefix."""
        if self._tracker is None:
            tracker = self.start(self._pipeline.name, self._run.id, folder.parent)
            tracker.store_init_configuration(settings(self._pipeline))
            self._tracker = tracker
        return Place(self._tracker, f"{name}/", self._offsets.get(name, 0))

    def sent(self, folder: Path) -> Sent:
        """Return what was sent to this run of the tracker."""
        return Sent.read(folder / self._note, self._run.id)

    def run_finished(self, pipeline: PipelineView, folder: Path, error: BaseException | None) -> None:
        """End the tracker, which waits until all is sent."""
        if self._tracker:
            self.end(self._tracker, error)
            self._tracker = None

    def end(self, tracker: GeneralTracker, error: BaseException | None) -> None:
        """End the tracker; `error` is what ended the run early."""
        tracker.finish()

    @property
    def _note(self) -> str:
        return f"{self.TRACKER}.json"


def require(package: str, extra: str = "trackers") -> None:
    """Raise ConfigError, which names the extra to install, unless a package is there."""
    if importlib.util.find_spec(package) is None:
        how = f"pip install 'corefit[{extra}]'" if extra else f"pip install {package}"
        raise ConfigError(f"the package {package} is missing; install it: {how}")


def settings(pipeline: PipelineView) -> dict[str, Plain]:
    """Return the keys of a pipeline as trackers show them, such as "stage.soar.steps", without paths and observers."""
    return {key: value for key, value in _flat("", pipeline.tables()) if not key.startswith(("observer", "out"))}


def _flat(key: str, value: Any) -> Iterator[tuple[str, Plain]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(f"{key}.{name}".strip("."), inner)
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            label = inner.get("name", inner.get("use", number)) if isinstance(inner, Mapping) else number
            yield from _flat(f"{key}.{label}", inner)
    elif isinstance(value, str) and Path(value).is_absolute():
        yield key, Path(value).name
    elif value is not None:
        yield key, value


def _means(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    for row in rows:
        below = "" if row["category"] == "all" else f"/{row['category']}"
        yield f"eval/{row['metric']}{below}", row["value"]
