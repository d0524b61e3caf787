"""The gradient of one optimizer step, from one objective or added up over several."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import define, field

from corefit.system.ranks import Ranks
from corefit.train import weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@define(eq=False)
class Gradients:
    """The gradients that backward leaves in the trainable parameters, or in this rank's shards of them.

    The objectives of a sum are backpropagated one after the other. `hold` sets the gradient of each aside, divided by
    its own count, and `merge` gives the parameters the sum. The held sum takes the memory of one more gradient. Nothing
    here waits for the device.
    """

    trainable: weights.Trainable
    ranks: Ranks
    _held: dict[torch.nn.Parameter, Tensor] = field(factory=dict["torch.nn.Parameter", "Tensor"])

    def norm(self) -> Tensor:
        """Return the norm [] of all gradients as one vector, over all shards."""
        import torch

        norm = torch.nn.utils.get_total_norm(self._local())
        if not self.ranks.sharded:
            return norm
        held = self.ranks.layout.replicate  # each shard is counted as often as it is held
        return (self.ranks.all_reduce(norm.to(self.ranks.device) ** 2) / held).sqrt()

    def multiply(self, factor: Tensor) -> None:
        """Multiply all gradients by `factor` []."""
        import torch

        torch._foreach_mul_(self._local(), factor)  # pyright: ignore[reportPrivateUsage]

    def hold(self, scale: Tensor) -> Tensor:
        """Move an objective's gradient, times `scale` [], from the parameters to the held sum; return its norm []."""
        norm = self.norm() * scale
        self.multiply(scale)
        self.merge()
        self._held = {p: p.grad for p in self.trainable.values() if p.grad is not None}
        for p in self._held:
            p.grad = None
        return norm

    def merge(self) -> None:
        """Add the held sum to the gradients of the parameters; nothing is held afterwards."""
        import torch

        both = [(p.grad, held) for p, held in self._held.items() if p.grad is not None]
        if both:
            new, old = zip(*both, strict=True)
            torch._foreach_add_(weights.local(new), weights.local(old))  # pyright: ignore[reportPrivateUsage]
        for p, held in self._held.items():
            if p.grad is None:
                p.grad = held
        self._held = {}

    def drop(self) -> None:
        """Free all gradients, held ones too."""
        self._held = {}
        for p in self.trainable.values():
            p.grad = None

    def complete(self) -> None:
        """Give parameters without a gradient one of zeros: `average` then needs no memory, and so cannot run out."""
        import torch

        for p in self.trainable.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad

    def average(self) -> None:
        """Replace each gradient by its mean over all ranks, as DDP's exchange does in a backward; they are complete."""
        import torch.distributed as dist

        for p in self.trainable.values():
            assert p.grad is not None
            dist.all_reduce(p.grad.div_(self.ranks.world))

    def _local(self) -> list[Tensor]:
        return weights.local(p.grad for p in self.trainable.values() if p.grad is not None)
