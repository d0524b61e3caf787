"""The gradient of one optimiser step: of one objective, or of several that are added up."""

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
    """What backward left in the parameters that train, on the ranks that hold them. Nothing here waits for the device.

    Parts of a sum are backpropagated one after the other; `hold` keeps each, divided by its own count, until `merge`.
    It takes the memory of one more gradient, and none where nothing is held.
    """

    named: weights.Trainable
    ranks: Ranks
    _held: dict[torch.nn.Parameter, Tensor] = field(factory=dict["torch.nn.Parameter", "Tensor"])

    def norm(self) -> Tensor:
        """Of all of them as one vector, over the ranks that hold shards of it."""
        import torch

        norm = torch.nn.utils.get_total_norm(self._local())
        return self.ranks.all_reduce(norm.to(self.ranks.device) ** 2).sqrt() if self.ranks.sharded else norm

    def multiply(self, factor: Tensor) -> None:
        """Multiply all by `factor` []."""
        import torch

        torch._foreach_mul_(self._local(), factor)  # pyright: ignore[reportPrivateUsage]

    def hold(self, scale: Tensor) -> Tensor:
        """Take a part's gradient, times `scale` [], out of the parameters; its norm."""
        norm = self.norm() * scale
        self.multiply(scale)
        self.merge()
        self._held = {p: p.grad for p in self.named.values() if p.grad is not None}
        for p in self._held:
            p.grad = None
        return norm

    def merge(self) -> None:
        """Add what is held to what the parameters have."""
        import torch

        both = [(p.grad, held) for p, held in self._held.items() if p.grad is not None]
        if both:
            new, old = zip(*both, strict=True)
            torch._foreach_add_(weights.local(new), weights.local(old))  # pyright: ignore[reportPrivateUsage]
        for p, held in self._held.items():
            if p.grad is None:
                p.grad = held
        self._held = {}

    def _local(self) -> list[Tensor]:
        return weights.local(p.grad for p in self.named.values() if p.grad is not None)
