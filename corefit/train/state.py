"""How far training has come: all that a checkpoint holds and that a resumed run reads back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import define, field

from corefit.errors import TrainingError
from corefit.system.ranks import SINGLE, Ranks
from corefit.train import checkpoint, weights
from corefit.train.alarm import Watch, refuse_non_finite
from corefit.train.meters import MetricMeans, NonFiniteGuard
from corefit.train.optimizer import Steps
from corefit.train.sizes import Sizes

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@define(eq=False, kw_only=True)
class State:
    """How far a stage's training has come.

    folder       where the stage's checkpoints lie
    transformer  the network under training, wrapped in DDP or sharded where there are several ranks
    trainable    the parameters that train, by name
    optimizer    takes its steps, and holds its state
    ema          their moving average, where the stage keeps one
    copies       the copies of them that the objective declares, by name
    watch        watches the held-out rewards, where the stage has any
    sizes        how many rows a forward has
    step         number of finished steps
    seconds      time that these steps took
    unreported   samples and seconds since the last logged step
    """

    stage: str
    folder: Path
    ranks: Ranks
    transformer: torch.nn.Module
    trainable: weights.Trainable
    optimizer: Steps
    ema: weights.Ema | None
    guard: NonFiniteGuard
    sizes: Sizes
    copies: Mapping[str, weights.MovingCopy] = field(factory=dict[str, weights.MovingCopy])
    means: MetricMeans = field(factory=MetricMeans)
    watch: Watch | None = None
    step: int = 0
    seconds: float = 0.0
    unreported: tuple[int, float] = (0, 0.0)

    def ema_applied(self) -> AbstractContextManager[None]:
        """Within, the network has the average in place of its weights: what the stage would leave if it ended now.

        Without `ema` nothing changes.
        """
        return self.ema.in_place_of(self.transformer, self.trainable) if self.ema else nullcontext()

    def add_time(self, samples: int, seconds: float) -> None:
        """Count the samples and the time of a step."""
        self.seconds += seconds
        self.unreported = (self.unreported[0] + samples, self.unreported[1] + seconds)

    def undoable(self) -> Callable[[], None]:
        """Return what takes back the metrics and faults that the optimizer step in progress notes from now on."""
        undo = self.means.undoable(), self.guard.undoable()

        def take_back() -> None:
            for each in undo:
                each()

        return take_back

    def move_copies(self, per: str, n: int) -> None:
        """Make the n-th move of the stage, counted from 1, of the copies that move `per` batch or update."""
        for held in self.copies.values():
            if held.moving.per == per:
                held.move(self.trainable, n)

    def refuse_non_finite(self) -> None:
        """Raise NonFinite where too many steps were skipped, and TrainingError where a weight is not finite.

        It is called before anything is saved.
        """
        import torch

        self.guard.refuse(self.stage, self.ranks)
        held = [self.trainable, self.ema.average if self.ema else {}, *(each.tensors for each in self.copies.values())]
        weights.settle(self.ranks.device)
        tensors = weights.local(t for each in held for t in each.values())
        finite = bool(torch.stack([t.isfinite().all().to(self.ranks.device) for t in tensors]).all())
        if self.ranks.any(not finite):
            raise TrainingError(
                f"stage {self.stage}: the weights after step {self.step} are not finite and are not saved; the "
                f"checkpoints in {self.folder} are good. Lower optimizer.lr and run again"
            )

    def save(self, identity: str, keep: int) -> Path | None:
        """Write a checkpoint of the step just finished; return its path on the ranks that wrote it, None on others.

        Raises as `refuse_non_finite`, and TrainingError where the disk refuses.

        identity  hash of what determines the stage's weights
        keep      how many checkpoints to keep
        """
        self.refuse_non_finite()
        means = self.means.by_rank(self.ranks)
        for name, sums in means.items() if self.watch else ():
            if "held_out/" in name:
                refuse_non_finite(name, float(sums.sum()))
        if not (self.ranks.main or self.ranks.sharded):
            return None
        tensors = {**self._tensors(), **{f"means/{name}": t for name, t in means.items()}}
        info = {"seconds": self.seconds, "since": list(self.unreported), "identity": identity}
        info |= {"sizes": self.sizes.state()}
        info |= {"alarm": self.watch.state()} if self.watch else {}
        holders = self.ranks if self.ranks.sharded else SINGLE
        return checkpoint.save(self.folder, self.step, tensors, info, keep, holders)

    def resume(self, keep: int) -> None:
        """Read the newest whole checkpoint, if there is one; all but the newest `keep` are removed."""
        import torch

        if self.ranks.main:
            checkpoint.remove_partial(self.folder)
        self.ranks.barrier()
        found, damaged = checkpoint.latest(self.folder, self.ranks)
        for message in damaged:
            self.ranks.accelerator.print(message)
        if found is None:
            return
        stored = found.stored()
        self._require_same_copies(found.path, stored)
        names = [name for name in stored if name.startswith("means/")]
        means = {name: torch.zeros(stored[name][0], dtype=torch.float64) for name in names}
        slots = self.optimizer.slots(stored)
        found.read({**self._weights(), **slots, **means})
        self.optimizer.restore(slots)
        if self.ranks.main:
            checkpoint.keep_newest(self.folder, keep)  # a process killed after saving has not removed older ones
        self.step, self.seconds = found.step, found.info["seconds"]
        self.unreported = (found.info["since"][0], found.info["since"][1])
        if "sizes" in found.info:  # a checkpoint of an earlier version has none
            self.sizes.restore(found.info["sizes"])
        if self.watch and "alarm" in found.info:  # held-out rewards may be new since the checkpoint was written
            self.watch.restore(found.info["alarm"])
        self.means.restore({name.removeprefix("means/"): t for name, t in means.items()}, self.ranks)

    def _tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint that are equal on all ranks, or this rank's shards of them."""
        return {**self._weights(), **self.optimizer.tensors()}

    def _weights(self) -> dict[str, Tensor]:
        """Return the weights, their average and copies, and the count of skipped steps."""
        tensors: dict[str, Tensor] = {f"weights/{name}": p for name, p in self.trainable.items()}
        if self.ema:
            tensors |= {f"ema/{name}": t for name, t in self.ema.average.items()}
        for copy, held in self.copies.items():
            tensors |= {f"copies/{copy}/{name}": t for name, t in held.tensors.items()}
        return {**tensors, "fault/skipped": self.guard.skipped}

    def _require_same_copies(self, path: Path, stored: Iterable[str]) -> None:
        """Raise TrainingError unless a checkpoint has the copies that the objective declares, and no others."""
        found = {name.split("/")[1] for name in stored if name.startswith("copies/")}
        if found != set(self.copies):
            raise TrainingError(
                f"stage {self.stage}: {path} holds the copies {sorted(found)} of the weights, and the objective "
                f"declares {sorted(self.copies)}; their names must follow from its keys, and from none marked ROUNDING"
            )
