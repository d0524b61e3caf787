"""Metrics and faults of steps, collected on the device; nothing waits for the device until a value is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from attrs import define, field

from corefit.errors import NonFinite
from corefit.system.ranks import Ranks

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@define(eq=False)
class MetricMeans:
    """Sums and counts of metrics since the last log; values of a skipped optimizer step do not count."""

    sums: dict[str, Tensor] = field(factory=dict[str, "Tensor"])
    """Name -> [sum, count], float64, of this rank."""
    _pending: dict[str, Tensor] = field(factory=dict[str, "Tensor"])
    """The same, of the optimizer step in progress alone."""

    def add(self, name: str, values: Tensor) -> None:
        """Add values [n] of the optimizer step in progress."""
        import torch

        values = values.detach().double()
        pair = torch.stack([values.sum(), torch.full_like(values.sum(), values.numel())])
        self._pending[name] = self._pending[name].to(pair.device) + pair if name in self._pending else pair

    def undoable(self) -> Callable[[], None]:
        """Return what takes back the values that are added from now on in the optimizer step in progress."""
        before = dict(self._pending)

        def undo() -> None:
            self._pending = dict(before)

        return undo

    def end_update(self, skipped: Tensor) -> None:
        """End the optimizer step in progress: count its values, or drop them where it was skipped (bool [])."""
        import torch

        for name, pending in self._pending.items():
            pair = torch.where(skipped.to(pending.device), 0, pending)
            self.sums[name] = self.sums[name].to(pair.device) + pair if name in self.sums else pair
        self._pending = {}

    def take(self, ranks: Ranks) -> dict[str, float]:
        """Return each metric's mean over all ranks, without metrics that have no values, and set the sums to zero."""
        import torch

        names = sorted(self.sums)
        if not names:
            return {}
        table = torch.stack([self.sums[name].to(ranks.device) for name in names])
        self.sums = {}
        rows: list[list[float]] = ranks.all_reduce(table).tolist()
        return {name: s / n for name, (s, n) in zip(names, rows, strict=True) if n}

    def by_rank(self, ranks: Ranks) -> dict[str, Tensor]:
        """Gather name -> [world, 2] for a checkpoint, so that as many ranks continue with exactly these sums."""
        import torch

        mine = {name: self.sums[name].cpu() for name in sorted(self.sums)}
        every = ranks.all_gather_object(mine)
        return {name: torch.stack([rank[name] for rank in every]) for name in mine}

    def restore(self, tables: dict[str, Tensor], ranks: Ranks) -> None:
        """Take this rank's row of `by_rank`'s tables; where the number of ranks differs, rank 0 takes all rows."""
        same = all(len(table) == ranks.world for table in tables.values())
        rest = {name: table.sum(0) * ranks.main for name, table in tables.items()}
        self.sums = {name: table[ranks.rank] for name, table in tables.items()} if same else rest


@define(eq=False)
class NonFiniteGuard:
    """Notes losses and gradients that are not finite, and counts the optimizer steps that are skipped for them.

    terms    what messages call the terms of a step
    limit    how many optimizer steps may be skipped; one more stops training
    skipped  how many were skipped, long []
    place    [step, term] of the newest fault; term -1 is the gradient
    found    whether the optimizer step in progress has a fault, bool []
    """

    terms: Sequence[str]
    limit: int
    skipped: Tensor
    place: Tensor
    found: Tensor

    @staticmethod
    def none(device: torch.device, terms: Sequence[str], limit: int = 0) -> NonFiniteGuard:
        """Make a guard that has found nothing yet."""
        import torch

        no = torch.zeros((), dtype=torch.bool, device=device)
        return NonFiniteGuard(
            terms, limit, torch.zeros((), dtype=torch.long, device=device), torch.zeros(2, device=device), no
        )

    def check(self, value: Tensor, step: int, term: int) -> None:
        """Note a fault where `value` [] is not finite; `place` keeps the first one of an optimizer step."""
        import torch

        bad = ~value.isfinite()
        place = torch.stack([torch.full_like(self.place[0], step), torch.full_like(self.place[1], term)])
        self.place = torch.where(bad & ~self.found & ~self.exceeded, place, self.place)
        self.found = self.found | bad

    def undoable(self) -> Callable[[], None]:
        """Return what takes back the faults that are noted from now on in the optimizer step in progress."""
        place, found = self.place, self.found

        def undo() -> None:
            self.place, self.found = place, found

        return undo

    def end_update(self) -> Tensor:
        """End the optimizer step in progress; return whether it must be skipped, bool []."""
        import torch

        skip = self.found | self.exceeded
        self.skipped = self.skipped + skip
        self.found = torch.zeros_like(self.found)
        return skip

    @property
    def exceeded(self) -> Tensor:
        """Whether more optimizer steps were skipped than may be, bool []; all steps after that are skipped too."""
        return self.skipped > self.limit

    def refuse(self, stage: str, ranks: Ranks) -> None:
        """Raise NonFinite, on all ranks alike, where the limit is exceeded. Waits for the device."""
        if not self.exceeded:
            return
        step, term = max(place for place in ranks.all_gather_object([int(n) for n in self.place.tolist()]))
        what = "the gradient" if term < 0 else f"the loss of {self.terms[term]}"
        past = f" (max_skips = {self.limit} optimizer steps were skipped before)" if self.limit else ""
        raise NonFinite(
            f"stage {stage}, step {step}: {what} is not finite{past}; the weights are those of the step before. Lower "
            'optimizer.lr, look at the data of that step, or run with precision = "fp32"'
        )
