"""TensorBoard: event files in the run's folder, a TensorBoard run for each stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import define, field

from corefit.types import PipelineView, TrainState
from corefit.types.stage import Stage
from corefit_trackers.base import COLUMNS, Place, Tracker
from corefit_trackers.sent import Sent

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker


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

    def place(self, name: str, folder: Path) -> Place:
        """Return the place of the stage."""
        return Place(self._writers.get(folder) or self._start(folder))

    def sent(self, folder: Path) -> Sent:
        """Return what was written of the stage."""
        return Sent.read(folder / self._note, "")

    def send_grid(self, place: Place, grid: Path, step: int) -> None:
        """Write a sample grid as an image."""
        writer: Any = place.tracker
        writer.log_images({"samples": pixels(grid)[None]}, step=step, dataformats="NHWC")

    def send_table(self, place: Place, rows: Sequence[Sequence[Any]], step: int) -> None:
        """Write the table of held-out scores as text."""
        lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
        cells = ([f"{c:.4g}" if isinstance(c, float) else "" if c is None else str(c) for c in line] for line in lines)
        place.tracker.log({"eval": "\n".join(f"| {' | '.join(line)} |" for line in cells)}, step=step)

    def run_finished(self, pipeline: PipelineView, folder: Path, error: BaseException | None) -> None:
        """Close all files."""
        for stage in [*self._writers]:
            self._end(stage)

    def _start(self, stage: Path, **keys: Any) -> GeneralTracker:
        from accelerate.tracking import TensorBoardTracker

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
