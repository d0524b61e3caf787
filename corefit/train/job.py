"""What the training of a stage is given, what it reports on the way, and what it took."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from attrs import frozen

from corefit.data.dataset import Dataset
from corefit.data.order import Order
from corefit.types import Backbone
from corefit.types.stage import Full, Lora, Stage

Metrics = Mapping[str, float]


@frozen(kw_only=True, eq=False)
class Job:
    """All that the training of one stage is given."""

    stage: Stage
    mode: Full | Lora
    seed: int
    backbone: Backbone
    dataset: Dataset
    order: Order
    folder: Path
    """The stage's own folder; checkpoints go to `checkpoints/` in it."""
    listener: Listener
    """Receives the events of training, and may request a stop."""
    identity: str = ""
    """Hash of what determines the stage's weights; its checkpoints carry it."""
    adapter: Path | None = None
    """The LoRA that the previous stage left, if it left one."""
    frozen_in_bf16: bool = False
    """Whether weights that do not train are held in bfloat16."""


@frozen
class Cost:
    """What the training of a stage took.

    seconds             time of all steps
    samples_per_second  over all ranks
    peak_memory         bytes on one rank
    survived            of the numbers that training moved, the share that still differ from the start after the saved
                        weights were rounded; None where they were not rounded
    """

    seconds: float
    samples_per_second: float
    peak_memory: int
    survived: float | None = None


class Listener(ABC):
    """Receives the events of training, and is asked after each step whether to stop.

    In `started`, `logged` and `saved` the network has the weights that the stage would leave if it ended then.
    """

    @abstractmethod
    def stop_requested(self) -> bool:
        """Return whether to write a checkpoint now and raise Stopped; one rank's True stops all."""

    @abstractmethod
    def started(self, step: int) -> None:
        """Training starts after `step` steps: 0, or those of the checkpoint that it continues from."""

    @abstractmethod
    def stepped(self, step: int, metrics: Metrics) -> None:
        """Step `step` is done; `metrics` are empty unless it is logged."""

    @abstractmethod
    def logged(self, step: int, metrics: Metrics) -> None:
        """Step `step` is done and logged."""

    @abstractmethod
    def saved(self, step: int, path: Path) -> None:
        """A whole checkpoint of `step` lies in `path`."""

    @abstractmethod
    def alarmed(self, text: str) -> None:
        """An alarm sounded in the step that was logged last."""

    @abstractmethod
    def ended(self, step: int, text: str) -> None:
        """The alarm `text` ended the stage after `step` steps, now or before a restart."""


class Silence(Listener):
    """Ignores every event and never stops training."""

    def stop_requested(self) -> bool:
        return False

    def started(self, step: int) -> None:
        pass

    def stepped(self, step: int, metrics: Metrics) -> None:
        pass

    def logged(self, step: int, metrics: Metrics) -> None:
        pass

    def saved(self, step: int, path: Path) -> None:
        pass

    def alarmed(self, text: str) -> None:
        pass

    def ended(self, step: int, text: str) -> None:
        pass
