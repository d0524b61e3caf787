"""What is noted of steps on the device, without waiting for it until someone asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attrs import define, field

from corefit.errors import NonFinite
from corefit.system.ranks import Ranks

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@define(eq=False)
class MetricMeans:
    """Sums and counts of what is logged, kept on the device until someone asks."""

    sums: dict[str, Tensor] = field(factory=dict[str, "Tensor"])
    """Name -> [sum, count], float64, of this rank."""
    _new: dict[str, Tensor] = field(factory=dict[str, "Tensor"])
    """The same of the optimiser step in progress."""

    def add(self, name: str, values: Tensor) -> None:
        """Add detached values [n] of the optimiser step in progress."""
        import torch

        values = values.detach().double()
        pair = torch.stack([values.sum(), torch.full_like(values.sum(), values.numel())])
        self._new[name] = self._new[name].to(pair.device) + pair if name in self._new else pair

    def settle(self, skipped: Tensor) -> None:
        """Keep what was added since the last call, or forget it if the step was skipped."""
        import torch

        for name, new in self._new.items():
            pair = torch.where(skipped.to(new.device), 0, new)
            self.sums[name] = self.sums[name].to(pair.device) + pair if name in self.sums else pair
        self._new = {}

    def take(self, ranks: Ranks) -> dict[str, float]:
        """MetricMeans over all ranks, and start anew; names of which there is nothing are left out."""
        import torch

        names = sorted(self.sums)
        if not names:
            return {}
        table = torch.stack([self.sums[name].to(ranks.device) for name in names])
        self.sums = {}
        rows: list[list[float]] = ranks.all_reduce(table).tolist()
        return {name: s / n for name, (s, n) in zip(names, rows, strict=True) if n}

    def by_rank(self, ranks: Ranks) -> dict[str, Tensor]:
        """Name -> [world, 2]: what a checkpoint holds, so that the same ranks go on to the last bit."""
        import torch

        mine = {name: self.sums[name].cpu() for name in sorted(self.sums)}
        every = ranks.all_gather_object(mine)
        return {name: torch.stack([rank[name] for rank in every]) for name in mine}

    def restore(self, tables: dict[str, Tensor], ranks: Ranks) -> None:
        """Take this rank's row; other ranks than those that wrote it give all to the first."""
        same = all(len(table) == ranks.world for table in tables.values())
        rest = {name: table.sum(0) * ranks.main for name, table in tables.items()}
        self.sums = {name: table[ranks.rank] for name, table in tables.items()} if same else rest


@define(eq=False)
class NonFiniteGuard:
    """Non-finite losses and gradients, noted on the device without waiting for it.

    terms    what messages call the terms of a step
    limit    how many optimiser steps may be skipped for one; the next stops training
    skipped  how many were
    place    [step, term] of the last, term -1 for the gradient
    now      whether the optimiser step in progress has one
    """

    terms: Sequence[str]
    limit: int
    skipped: Tensor
    place: Tensor
    now: Tensor

    @staticmethod
    def none(device: torch.device, terms: Sequence[str], limit: int = 0) -> NonFiniteGuard:
        import torch

        no = torch.zeros((), dtype=torch.bool, device=device)
        return NonFiniteGuard(
            terms, limit, torch.zeros((), dtype=torch.long, device=device), torch.zeros(2, device=device), no
        )

    def see(self, value: Tensor, step: int, term: int) -> None:
        """Note whether `value` is finite."""
        import torch

        bad = ~value.isfinite()
        here = torch.stack([torch.full_like(self.place[0], step), torch.full_like(self.place[1], term)])
        self.place = torch.where(bad & ~self.now & ~self.over, here, self.place)
        self.now = self.now | bad

    def settle(self) -> Tensor:
        """Whether this optimiser step must leave the weights as they are, bool []; the next one begins."""
        import torch

        leave = self.now | self.over
        self.skipped = self.skipped + leave
        self.now = torch.zeros_like(self.now)
        return leave

    @property
    def over(self) -> Tensor:
        """Whether training must stop, bool []."""
        return self.skipped > self.limit

    def refuse(self, stage: str, ranks: Ranks) -> None:
        """NonFinite, on all ranks alike, if there were too many; waits for the device."""
        if not self.over:
            return
        step, term = max(place for place in ranks.all_gather_object([int(n) for n in self.place.tolist()]))
        what = "the gradient" if term < 0 else f"the loss of {self.terms[term]}"
        past = f" (max_skips = {self.limit} optimizer steps were skipped before)" if self.limit else ""
        raise NonFinite(
            f"stage {stage}, step {step}: {what} is not finite{past}; the weights are those of the step before. Lower "
            'optimizer.lr, look at the data of that step, or run with precision = "fp32"'
        )
