"""Where training stands: all that a checkpoint holds and a resume brings back."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import define, field

from corefit.errors import TrainingError
from corefit.system.ranks import SINGLE, Ranks
from corefit.train import checkpoint, weights
from corefit.train.meters import MetricMeans, NonFiniteGuard

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.optim import Optimizer


@define(eq=False, kw_only=True)
class State:
    """What a stage's training has done so far.

    transformer  the network under training, as the trainer has wrapped it
    trainable    the parameters that train, by name
    ema          their average, where the stage keeps one
    step         steps that are done, and the seconds that they took
    unreported   samples and seconds since the last report
    """

    stage: str
    folder: Path
    """Where its checkpoints lie."""
    ranks: Ranks
    transformer: torch.nn.Module
    trainable: weights.Trainable
    optimizer: Optimizer
    ema: weights.Ema | None
    guard: NonFiniteGuard
    means: MetricMeans = field(factory=MetricMeans)
    step: int = 0
    seconds: float = 0.0
    unreported: tuple[int, float] = (0, 0.0)

    def to_be_left(self) -> AbstractContextManager[None]:
        """Within it the network has the weights that the stage would leave now: the average, where there is one."""
        return self.ema.in_place_of(self.transformer, self.trainable) if self.ema else nullcontext()

    def refuse_spoiled(self) -> None:
        """NonFinite where training went wrong, TrainingError where weights are not finite: such are never saved."""
        import torch

        self.guard.refuse(self.stage, self.ranks)
        held = weights.local([*self.trainable.values(), *(self.ema.average.values() if self.ema else ())])
        fine = bool(torch.stack([t.isfinite().all() for t in held]).all())
        if self.ranks.any(not fine):
            raise TrainingError(
                f"stage {self.stage}: the weights after step {self.step} are not finite and are not saved; the "
                f"checkpoints in {self.folder} are good. Lower optimizer.lr and run again"
            )

    def save(self, identity: str, keep: int) -> Path | None:
        """Write a checkpoint of the step just finished; its path, on ranks that took part. Never of spoiled weights.

        identity  hash of what determines the stage's weights
        keep      checkpoints that stay
        """
        self.refuse_spoiled()
        means = self.means.by_rank(self.ranks)
        if not (self.ranks.main or self.ranks.sharded):
            return None
        tensors = {**self._tensors(), **{f"means/{name}": t for name, t in means.items()}}
        info = {"seconds": self.seconds, "since": list(self.unreported), "identity": identity}
        holders = self.ranks if self.ranks.sharded else SINGLE
        return checkpoint.save(self.folder, self.step, tensors, info, keep, holders)

    def resume(self, keep: int) -> None:
        """Continue from the newest whole checkpoint, if there is one."""
        import torch

        if self.ranks.main:
            checkpoint.sweep(self.folder)
        self.ranks.barrier()
        found, damaged = checkpoint.latest(self.folder, self.ranks)
        for message in damaged:
            self.ranks.accelerator.print(message)
        if found is None:
            return
        shapes = found.shapes()
        self._expect_optimizer(shapes)
        names = [name for name in shapes if name.startswith("means/")]
        means = {name: torch.zeros(shapes[name], dtype=torch.float64) for name in names}
        found.read({**self._tensors(), **means})
        if self.ranks.main:
            checkpoint.prune(self.folder, keep)  # what a killed process did not come to remove
        self.step, self.seconds = found.step, found.info["seconds"]
        self.unreported = (found.info["since"][0], found.info["since"][1])
        self.means.restore({name.removeprefix("means/"): t for name, t in means.items()}, self.ranks)

    def _tensors(self) -> dict[str, Tensor]:
        """What of a checkpoint is equal on all ranks, or a rank's shards of it."""
        tensors: dict[str, Tensor] = {f"weights/{name}": p for name, p in self.trainable.items()}
        for name, parameter in self.trainable.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer/{key}/{name}"] = value
        if self.ema:
            tensors |= {f"ema/{name}": t for name, t in self.ema.average.items()}
        return {**tensors, "fault/skipped": self.guard.skipped}

    def _expect_optimizer(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Make room for the optimizer's state, which torch itself makes in its first step."""
        import torch

        for name, shape in shapes.items():
            kind, _, rest = name.partition("/")
            if kind == "optimizer":
                key, _, weight = rest.partition("/")
                parameter = self.trainable[weight]
                value = torch.zeros_like(parameter) if shape else torch.zeros((), device=parameter.device)
                self.optimizer.state[parameter][key] = value.detach()
