"""What is noted of steps on the device, without waiting for it until someone asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import define, field

from corefit.errors import TrainingError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor


@define(eq=False)
class Means:
    """Sums and counts of what is logged, kept on the device until someone asks."""

    sums: dict[str, Tensor] = field(factory=dict[str, "Tensor"])
    """Name -> [sum, count], float64."""

    def add(self, name: str, values: Tensor) -> None:
        """Add detached values [n]."""
        import torch

        values = values.detach().double()
        pair = torch.stack([values.sum(), torch.full_like(values.sum(), values.numel())])
        self.sums[name] = self.sums[name].to(pair.device) + pair if name in self.sums else pair

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all ranks, and start anew."""
        import torch

        names = sorted(self.sums)
        if not names:
            return {}
        table = torch.stack([self.sums[name].to(accelerator.device) for name in names])
        self.sums = {}
        rows: list[list[float]] = summed(table, accelerator).tolist()
        return {name: s / n if n else float("nan") for name, (s, n) in zip(names, rows, strict=True)}


@define(eq=False)
class Fault:
    """The first non-finite loss or gradient of a stage, noted on the device without waiting for it.

    place: [step, term], term -1 for the gradient.
    """

    seen: Tensor
    place: Tensor

    @staticmethod
    def none(device: torch.device) -> Fault:
        import torch

        return Fault(torch.zeros((), dtype=torch.bool, device=device), torch.zeros(2, device=device))

    def see(self, value: Tensor, step: int, term: int) -> None:
        import torch

        bad = ~value.isfinite()
        here = torch.stack([torch.full_like(self.place[0], step), torch.full_like(self.place[1], term)])
        self.place = torch.where(bad & ~self.seen, here, self.place)
        self.seen = self.seen | bad

    def refuse(self, stage: str) -> None:
        """TrainingError if one was seen; waits for the device."""
        if not self.seen:
            return
        step, term = (int(n) for n in self.place.tolist())
        what = "the gradient" if term < 0 else f"the loss of term {term}"
        raise TrainingError(
            f"stage {stage}, step {step}: {what} is not finite; the weights are those of the step before. Lower "
            'optimizer.lr, look at the data of that step, or run with precision = "fp32"'
        )


def summed(x: Tensor, accelerator: Accelerator) -> Tensor:
    """x added up over all ranks."""
    total: Any = accelerator.reduce(x, "sum") if accelerator.num_processes > 1 else x
    return total
