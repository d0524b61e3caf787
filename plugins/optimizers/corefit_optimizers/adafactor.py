"""Adafactor (Shazeer and Stern, 2018, https://arxiv.org/abs/1804.04235), by transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from attrs import field, frozen, validators

from corefit import Optimizer
from corefit.types import step_each

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Parameter


@frozen(kw_only=True)
class Adafactor(Optimizer):
    """Adafactor with the learning rate that is given: a matrix has the state of its rows and columns alone.

    Steps are relative neither to the weights nor to the number of steps, as is usual in fine-tuning. It needs whole
    weights, whose rows and columns it averages.
    """

    decay_rate: float = field(default=-0.8, validator=[validators.gt(-1), validators.lt(0)])
    """Exponent c of the decay of the running mean in step t, 1 - t^c."""
    clip_threshold: float = field(default=1.0, validator=validators.gt(0))
    """An update of a weight whose root mean square is larger is scaled down to it, before the learning rate."""
    eps: float = field(default=1e-30, validator=validators.gt(0))
    """A small number that is added to the square of the gradient."""
    beta1: float | None = field(default=None, validator=validators.optional([validators.ge(0), validators.lt(1)]))
    """Decay rate of a running mean of the updates, which takes 4 bytes for each number; by default there is none."""
    weight_decay: float = field(default=0.0, validator=validators.ge(0))
    """Decoupled weight decay, applied to all trainable weights."""

    def make(self, parameters: Mapping[str, Parameter]) -> torch.optim.Optimizer:
        from transformers.optimization import Adafactor as Transformers

        return Transformers(
            list(parameters.values()),
            lr=self.lr,
            eps=(self.eps, 1e-3),
            clip_threshold=self.clip_threshold,
            decay_rate=self.decay_rate,
            beta1=self.beta1,
            weight_decay=self.weight_decay,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        )

    def state_bytes(self, parameter: Tensor) -> float:
        """Return the bytes of the means of rows and columns, or of numbers where there is only one axis."""
        shape, number = parameter.shape, parameter.numel()
        factored = number // shape[-1] + number // shape[-2] if len(shape) > 1 and number else number
        return 4 * (factored + (number if self.beta1 is not None else 0) + 1)

    def step(self, optimizer: torch.optim.Optimizer, unchanged: Tensor) -> None:
        step_each(optimizer, unchanged)
