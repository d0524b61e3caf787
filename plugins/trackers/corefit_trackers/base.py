"""What all trackers share: what they are sent, under which names and at which steps, and nothing twice."""

from __future__ import annotations

import importlib.util
import json
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


@frozen(eq=False, kw_only=True)
class Event:
    """What a tracker is sent at once.

    name    "base", or the stage's name
    folder  its folder in the run
    step    the stage's step
    values  numbers by name; those that are not finite are left out
    grid    a sample grid, a PNG
    rows    a table of held-out scores, each row with a value for each of COLUMNS
    scored  whether these are held-out scores, which follow the metrics of the stage's last step
    """

    name: str
    folder: Path
    step: int
    values: Mapping[str, float]
    grid: Path | None = None
    rows: Sequence[Sequence[Any]] = ()
    scored: bool = False

    def numbers(self, prefix: str = "") -> dict[str, Any]:
        """Return the numbers that are finite, with `prefix` before their names."""
        return {prefix + name: value for name, value in self.values.items() if math.isfinite(value)}


@define(kw_only=True, slots=False)
class Tracker(Observer):
    """Sends logged metrics, sample grids and held-out scores to a tracker of accelerate.

    A tracker that fails is left out for the rest of the run: it must not cost the run.
    """

    optional: ClassVar[bool] = True
    TRACKER: ClassVar[str]
    """The tracker's name in accelerate, and in the names of the notes of what was sent."""

    @abstractmethod
    def send(self, event: Event) -> None:
        """Send an event; the tracker is started if it is not."""
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
            grid = state.grid if state.grid and state.grid.exists() else None
            self.send(Event(name=stage.name, folder=state.folder, step=state.step, values=metrics, grid=grid))
            sent.step = state.step
            self.note(sent)

    def scored(self, scored: Scored) -> None:
        """Send held-out means, their table and the samples, unless they were sent before."""
        sent = self.sent(scored.folder)
        if digest(scored) != sent.scores:
            grid = scored.grid if scored.grid and scored.grid.exists() else None
            rows, means = [[row.get(name) for name in COLUMNS] for row in scored.rows], dict(_means(scored.rows))
            stage: dict[str, Any] = {"name": scored.name, "folder": scored.folder, "step": scored.step}
            self.send(Event(**stage, values=means, grid=grid, rows=rows, scored=True))
            sent.scores = digest(scored)
            self.note(sent)

    def note(self, sent: Sent) -> None:
        """Note what was sent."""
        sent.write()


@define(kw_only=True, slots=False)
class RunTracker(Tracker):
    """A tracker that has one run for all stages: their names stand before those of metrics, their steps add up."""

    _run: SentRun = field(init=False)
    _tracker: Any = field(init=False, default=None)
    """The tracker of accelerate, once something was sent."""
    _offsets: Mapping[str, int] = field(init=False, factory=dict[str, int])
    """How many steps the stages before each stage have."""
    _pipeline: PipelineView = field(init=False)
    _unwritten: dict[Path, Sent] = field(init=False, factory=dict[Path, Sent])
    """Notes of what was sent that are written when the tracker ends, where it is not `lasting`."""

    @property
    def lasting(self) -> bool:
        """Whether what was sent outlives a kill of this process; otherwise a killed run is sent anew, as another."""
        return True

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
        self._unwritten = {}
        steps = [stage.steps for stage in pipeline.stage]
        self._offsets = {stage.name: sum(steps[:number]) for number, stage in enumerate(pipeline.stage)}

    def stage_started(self, stage: Stage, state: TrainState) -> None:
        """Begin another run of the tracker if the stage is another one than that of which metrics were sent.

        What an earlier process logged of the stage and did not send, or lost, is sent from metrics.jsonl.
        """
        run = self._run.entered(state.folder, state.folder / self._note)
        if run.id != self._run.id and self._tracker:
            self._end(None)
        self._run = run
        if self.lasting:
            run.write()
        sent = self.sent(state.folder)
        for metrics in _logged(state.folder, sent.step, state.step):
            sent.step = int(metrics.pop("step"))
            grid = state.folder / "samples" / f"step-{sent.step:06d}.png"
            drawn = grid if grid.exists() and sent.step < stage.steps else None
            self.send(Event(name=stage.name, folder=state.folder, step=sent.step, values=metrics, grid=drawn))
            self.note(sent)

    def send(self, event: Event) -> None:
        """Send the event's numbers, and what else the tracker takes, with the stage's name before all names."""
        if self._tracker is None:
            know_ranks()
            tracker = self.start(self._pipeline.name, self._run.id, event.folder.parent)
            tracker.store_init_configuration(settings(self._pipeline))
            self._tracker = tracker
        step = self._offsets.get(event.name, 0) + event.step
        self.log(self._tracker, {**event.numbers(f"{event.name}/"), **self.more(event)}, step, event)

    def more(self, event: Event) -> dict[str, Any]:
        """Return what the tracker takes of an event besides numbers, by name; by default nothing."""
        return {}

    def log(self, tracker: Any, values: dict[str, Any], step: int, event: Event) -> None:
        """Hand values to the tracker, at a step of all stages together."""
        tracker.log(values, step=step)

    def sent(self, folder: Path) -> Sent:
        """Return what was sent to this run of the tracker."""
        return self._unwritten.get(folder) or Sent.read(folder / self._note, self._run.id)

    def note(self, sent: Sent) -> None:
        """Note what was sent: at once, or where the tracker must end first, then."""
        if self.lasting:
            sent.write()
        else:
            self._unwritten[sent.file.parent] = sent

    def run_finished(self, pipeline: PipelineView, folder: Path, error: BaseException | None) -> None:
        """End the tracker, which waits until all is sent."""
        if self._tracker:
            self._end(error)

    def _end(self, error: BaseException | None) -> None:
        """End the tracker, and write down what was sent."""
        self.end(self._tracker, error)
        self._tracker = None
        self._run.write()
        for sent in self._unwritten.values():
            sent.write()
        self._unwritten = {}

    def end(self, tracker: GeneralTracker, error: BaseException | None) -> None:
        """End the tracker; `error` is what ended the run early."""
        tracker.finish()

    @property
    def _note(self) -> str:
        return f"{self.TRACKER}.json"


def know_ranks() -> None:
    """Let accelerate know the processes, which a run has done long ago: its trackers ask for the main one."""
    from accelerate import PartialState

    PartialState()


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


def _logged(folder: Path, after: int, until: int) -> Iterator[dict[str, float]]:
    """Yield the lines of a stage's metrics.jsonl with steps from `after` + 1 to `until`."""
    file = folder / "metrics.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        metrics: dict[str, Any] = json.loads(line)
        if after < metrics["step"] <= until:
            yield {name: value for name, value in metrics.items() if value is not None}
