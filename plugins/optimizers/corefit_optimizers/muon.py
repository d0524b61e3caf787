"""Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon), by torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from attrs import field, frozen, validators

from corefit import Optimizer
from corefit.types import AdamW, step_each

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Parameter

share: Any = [validators.ge(0), validators.lt(1)]


@frozen(kw_only=True)
class Muon(Optimizer):
    """Muon for matrices: the step is the momentum with all singular values near 1. AdamW trains what is no matrix.

    It needs whole weights. The weights of convolutions, biases and norms are trained by AdamW, with the same learning
    rate and weight decay, and `betas` and `eps` of their own.
    """

    momentum: float = field(default=0.95, validator=share)
    """Decay rate of the running mean of the gradient."""
    nesterov: bool = True
    """Whether the step looks ahead by one gradient (Nesterov's momentum)."""
    iterations: int = field(default=5, validator=[validators.gt(0), validators.lt(100)])
    """How many iterations of Newton and Schulz bring the singular values near 1."""
    scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Factor of the learning rate for a matrix of A rows and B columns: "match_rms_adamw" is 0.2 sqrt(max(A, B)), with
    which AdamW's learning rates serve (https://arxiv.org/abs/2502.16982), "original" is sqrt(max(1, A / B))."""
    weight_decay: float = field(default=1e-2, validator=validators.ge(0))
    """Decoupled weight decay, applied to all trainable weights."""
    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=validators.deep_iterable(share))
    """Decay rates of AdamW's running means, for what is no matrix."""
    eps: float = field(default=1e-8, validator=validators.gt(0))
    """A small number that AdamW adds to the denominator, for what is no matrix."""

    def make(self, parameters: Mapping[str, Parameter]) -> torch.optim.Optimizer:
        return _pair(self, parameters)

    def state_bytes(self, parameter: Tensor) -> float:
        """Return the bytes of a matrix's momentum, or of AdamW's two moments."""
        return (1 if parameter.ndim == 2 else 2) * 4 * parameter.numel()

    def step(self, optimizer: torch.optim.Optimizer, unchanged: Tensor) -> None:
        import torch

        pair: Any = optimizer
        for part in pair.parts:
            if isinstance(part, torch.optim.Muon):
                step_each(part, unchanged)
            else:
                self.adamw.step(part, unchanged)

    @property
    def adamw(self) -> AdamW:
        """The optimizer of what is no matrix."""
        return AdamW(lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)


def _pair(keys: Muon, parameters: Mapping[str, Parameter]) -> Any:
    """Return an optimizer that holds two as `parts`: torch's Muon of the matrices, and AdamW of the rest."""
    import torch

    matrices = [p for p in parameters.values() if p.ndim == 2]
    others = {name: p for name, p in parameters.items() if p.ndim != 2}
    muon = [
        torch.optim.Muon(
            matrices,
            lr=keys.lr,
            weight_decay=keys.weight_decay,
            momentum=keys.momentum,
            nesterov=keys.nesterov,
            ns_steps=keys.iterations,
            adjust_lr_fn=keys.scale,
        )
    ]
    parts = [*(muon if matrices else []), *([keys.adamw.make(others)] if others else [])]

    class Pair(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__([group for part in parts for group in part.param_groups], {})
            self.parts = parts
            for part in parts:
                part.state = self.state

    return Pair()
