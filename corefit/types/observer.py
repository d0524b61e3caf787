"""The protocol of observers, and what they are told: the pipeline, and what an evaluation found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from attrs import field, frozen

from corefit.types.stage import Stage, TrainState

if TYPE_CHECKING:
    from torch import Tensor


class PipelineView(Protocol):
    """What an observer may read of the pipeline that runs."""

    @property
    def name(self) -> str:
        """The run's name."""
        ...

    @property
    def stage(self) -> tuple[Stage, ...]:
        """The stages, in the order in which they run."""
        ...

    @property
    def seed(self) -> int:
        """The seed of all randomness."""
        ...

    @property
    def run_folder(self) -> Path:
        """The run's folder."""
        ...

    def tables(self) -> Mapping[str, Any]:
        """Return the tables of the pipeline file, with all defaults written out."""
        ...


@frozen(eq=False, kw_only=True)
class Scored:
    """What the evaluation of the base model, or of a stage, found.

    name        "base", or the stage's name
    folder      its folder, such as runs/<name>/01-soar
    step        how many steps the stage trained; 0 for the base
    values      for each metric the score of every held-out prompt, [n]
    categories  the category of every held-out prompt, "" where it has none, [n]
    rows        its rows of results.json: metric, category, value, interval and gain
    samples     (prompts, media [n, 3, H, W] or clips, in [0, 1]) of the first [eval] prompts, as they were generated
                for the scores; None where the scores are those of an earlier run
    grid        the PNG that these samples were drawn to
    earlier     whether an earlier run found these scores, and this one read them from its folder
    """

    name: str
    folder: Path
    step: int = 0
    values: Mapping[str, Sequence[float]] = field(factory=dict[str, Sequence[float]])
    categories: Sequence[str] = ()
    rows: Sequence[Mapping[str, Any]] = ()
    samples: tuple[Sequence[str], Tensor] | None = None
    grid: Path | None = None
    earlier: bool = False


class Observer(Protocol):
    """Is told what happens in a run, and changes nothing in it.

    It is an attrs class; its fields are the keys of an `[[observer]]` table. All members have defaults, which a class
    that derives from this one inherits: the methods do nothing. They are called on the main process only, never within
    a step, and training waits for them. A resumed run calls `run_started` and `stage_started` again.
    """

    optional: ClassVar[bool] = False
    """Whether the run goes on where a method of it raises an exception. That is then said once, and nothing more is
    told to the observer. Otherwise the exception ends the run."""

    def check(self) -> None:
        """Raise CorefitError if something is missing that shows at once, such as a package, a file or a key.

        `corefit check` and `corefit run` call it before anything else happens.
        """

    def run_started(self, pipeline: PipelineView, folder: Path) -> None:
        """Observe that a run starts, or continues, in `folder`."""

    def stage_started(self, stage: Stage, state: TrainState) -> None:
        """Observe that a stage is about to train, after `state.step` steps."""

    def step_finished(self, stage: Stage, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Observe a logged step; the metrics are means over all ranks and over the steps since the last logged one."""

    def checkpoint_saved(self, stage: Stage, state: TrainState, path: Path) -> None:
        """Observe that a checkpoint was saved; `path` is complete."""

    def stage_finished(self, stage: Stage, state: TrainState) -> None:
        """Observe that a stage's weights are final and saved in `state.folder / "model"`."""

    def scored(self, scored: Scored) -> None:
        """Observe that the base model, or what a stage left, was evaluated."""

    def run_finished(self, pipeline: PipelineView, folder: Path, error: BaseException | None) -> None:
        """Observe that a run ends; `error` is why it ends early, a KeyboardInterrupt where a signal stopped it."""
