"""TensorBoard: event files in the run's folder, a TensorBoard run for each stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from attrs import define, field

from corefit.types import PipelineView, TrainState
from corefit.types.stage import Stage
from corefit_trackers.base import COLUMNS, Event, Tracker, know_ranks
from corefit_trackers.sent import Sent


@define(kw_only=True, slots=False)
class TensorBoard(Tracker):
    """Writes TensorBoard's event files. Each stage is a run in TensorBoard, so that curves of stages lie together.

    Look at them with `tensorboard --logdir runs`. What a stage wrote after the checkpoint from which it continues is
    marked as void in the files, and TensorBoard does not show it.
    """

    TRACKER: ClassVar[str] = "tensorboard"

    folder: Path | None = None
    """The folder of the event files; by default `tensorboard` in the run's folder."""
    _writers: dict[Path, Any] = field(init=False, factory=dict[Path, Any])
    """The trackers of accelerate by the folders of the stages, while they are open."""

    def run_started(self, pipeline: PipelineView, folder: Path) -> None:
        """Begin without writers."""
        self._writers = {}

    def stage_started(self, stage: Stage, state: TrainState) -> None:
        """Begin a file that makes void what was written after the step from which the stage trains."""
        self._end(state.folder)
        self._start(state.folder, purge_step=state.step + 1)
        Sent(state.folder / self._note, "", state.step).write()

    def send(self, event: Event) -> None:
        """Write an event. Its numbers come last, for with them all is written to the disk."""
        writer = self._writers.get(event.folder) or self._start(event.folder)
        if event.grid:
            writer.log_images({"samples": pixels(event.grid)[None]}, step=event.step, dataformats="NHWC")
        writer.log({**({"eval": _table(event.rows)} if event.rows else {}), **event.numbers()}, step=event.step)

    def sent(self, folder: Path) -> Sent:
        """Return what was written of the stage."""
        return Sent.read(folder / self._note, "")

    def run_finished(self, pipeline: PipelineView, folder: Path, error: BaseException | None) -> None:
        """Close all files."""
        for stage in [*self._writers]:
            self._end(stage)

    def _start(self, stage: Path, **keys: Any) -> Any:
        from accelerate.tracking import TensorBoardTracker

        know_ranks()
        folder = self.folder / stage.parent.name if self.folder else stage.parent / "tensorboard"
        self._writers[stage] = tracker = TensorBoardTracker(stage.name, logging_dir=folder, **keys)
        tracker.start()
        return tracker

    def _end(self, stage: Path) -> None:
        if stage in self._writers:
            self._writers.pop(stage).finish()

    @property
    def _note(self) -> str:
        return f"{self.TRACKER}.json"


def pixels(png: Path) -> Any:
    """Return the pixels of a picture, [H, W, 3]."""
    import numpy as np
    from PIL import Image

    with Image.open(png) as picture:
        return np.asarray(picture.convert("RGB"))


def _table(rows: Sequence[Sequence[Any]]) -> str:
    """Return rows of COLUMNS as a table in Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    cells = ([f"{c:.4g}" if isinstance(c, float) else "" if c is None else str(c) for c in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
