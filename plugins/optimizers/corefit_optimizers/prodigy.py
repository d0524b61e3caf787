"""Prodigy (Mishchenko and Defazio, 2023, https://arxiv.org/abs/2306.06101), which finds the learning rate itself.

The step is that of the authors' package prodigyopt, which reads two numbers of each weight on the host in every step.
Here all of them stay on the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import field, frozen, validators

from corefit import Optimizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Parameter

share: Any = [validators.ge(0), validators.lt(1)]
Weights = list[tuple[Any, dict[str, Any]]]
"""Each weight that has a gradient, with its state."""


@frozen(kw_only=True)
class Prodigy(Optimizer):
    """Prodigy: Adam whose learning rate is `lr` times an estimate of the distance to the solution.

    Its state takes twice as much memory as AdamW's. It needs whole weights, of which it takes one sum.
    """

    lr: float = field(default=1.0, validator=validators.gt(0))
    """A factor of the learning rate that Prodigy finds, and follows the schedule. The authors advise to leave it 1."""
    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=validators.deep_iterable(share))
    """Decay rates of the running means of the gradient and of its square."""
    beta3: float | None = field(default=None, validator=validators.optional(share))
    """Decay rate of the sums of which the estimate is made; by default the square root of the second of `betas`."""
    eps: float = field(default=1e-8, validator=validators.gt(0))
    """A small number that is added to the denominator, times the estimate."""
    weight_decay: float = field(default=1e-2, validator=validators.ge(0))
    """Decoupled weight decay, applied to all trainable weights."""
    use_bias_correction: bool = False
    """Whether the running means are corrected for their start at 0, as Adam's are."""
    safeguard_warmup: bool = False
    """Whether the learning rate is left out of one of the sums, so that a warm-up does not make the estimate too large.
    Set it where `warmup` is set."""
    d0: float = field(default=1e-6, validator=validators.gt(0))
    """The estimate in the first step."""
    d_coef: float = field(default=1.0, validator=validators.gt(0))
    """A factor of the estimate: 0.5 for smaller steps, 2 for larger ones."""
    growth_rate: float | None = field(default=None, validator=validators.optional(validators.gt(1)))
    """By which factor the estimate may grow in a step at most; by default any."""

    def make(self, parameters: Mapping[str, Parameter]) -> torch.optim.Optimizer:
        return _made(self, parameters)

    def state_bytes(self, parameter: Tensor) -> float:
        """Return the bytes of two moments, of the start and of a sum of gradients."""
        return 4 * 4 * parameter.numel()

    def step(self, optimizer: torch.optim.Optimizer, unchanged: Tensor) -> None:
        made: Any = optimizer
        made.step_unless(unchanged)

    @property
    def decays(self) -> tuple[float, float, float]:
        """The decay rates of both running means, and of the sums that the estimate is made of."""
        beta1, beta2 = self.betas
        return beta1, beta2, math.sqrt(beta2) if self.beta3 is None else self.beta3


def _made(keys: Prodigy, parameters: Mapping[str, Parameter]) -> Any:
    """Return the optimizer; its group holds the estimate d, and what it is made of, as float64 [] on the device."""
    import torch

    class Made(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__(list(parameters.values()), {"lr": keys.lr})
            group = self.param_groups[0]
            numbers = {"d": keys.d0, "d_max": keys.d0, "numerator": 0.0, "k": 0.0}
            device = group["params"][0].device
            group |= {key: torch.tensor(v, dtype=torch.float64, device=device) for key, v in numbers.items()}
            for p in group["params"]:
                self.state[p] = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq", "s")}
                self.state[p]["p0"] = p.detach().clone()

        def step(self, closure: Any = None) -> Any:
            self.step_unless(torch.zeros((), dtype=torch.bool, device=self.param_groups[0]["d"].device))

        @torch.no_grad()
        def step_unless(self, unchanged: Tensor) -> None:
            group = self.param_groups[0]
            weights = [(p, self.state[p]) for p in group["params"] if p.grad is not None]
            _take_step(keys, group, weights, unchanged)

    return Made()


def _take_step(keys: Prodigy, group: dict[str, Any], weights: Weights, unchanged: Tensor) -> None:
    """Take a step; where `unchanged` (bool []), every gradient counts as 0 and every decay as 1."""
    import torch

    d, k = group["d"], group["k"] + 1
    beta1, beta2, beta3 = keys.decays
    bias = (1 - beta2**k).sqrt() / (1 - beta1**k) if keys.use_bias_correction else 1.0
    dlr = d * group["lr"] * bias
    delta, denominator = _gather(keys, d, dlr, weights, unchanged)
    moves = ~unchanged & (denominator > 0)
    numerator = group["numerator"] * beta3 + delta
    found = torch.where(moves, keys.d_coef * numerator / denominator, d)
    first = torch.where(d == keys.d0, torch.maximum(d, found), d)
    highest = torch.maximum(group["d_max"], found)
    after = torch.minimum(highest, first * (math.inf if keys.growth_rate is None else keys.growth_rate))
    _move(keys, after, torch.where(moves, dlr, 0.0), weights)
    for key, value in {"d": after, "d_max": highest, "numerator": numerator, "k": k}.items():
        group[key].copy_(torch.where(moves, value, group[key]))


def _gather(keys: Prodigy, d: Tensor, dlr: Tensor, weights: Weights, unchanged: Tensor) -> tuple[Tensor, Tensor]:
    """Take the gradients into the state; return what they add to the numerator, and the denominator."""
    import torch

    beta1, beta2, _ = keys.decays
    weight = d / keys.d0 * (d if keys.safeguard_warmup else dlr)
    delta = denominator = torch.zeros_like(d)
    kept1, kept2, kept3 = (torch.where(unchanged, 1.0, beta) for beta in keys.decays)
    for p, state in weights:
        g = p.grad.masked_fill_(unchanged, 0.0)
        delta = delta + d / keys.d0 * dlr * torch.dot(g.flatten(), (state["p0"] - p).flatten())
        state["s"].mul_(kept3).add_(g * weight.float())
        denominator = denominator + state["s"].abs().sum()
        g.mul_(d.float())
        state["exp_avg"].mul_(kept1).add_(g, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(kept2).addcmul_(g, g, value=1 - beta2)
    return delta, denominator


def _move(keys: Prodigy, d: Tensor, dlr: Tensor, weights: Weights) -> None:
    """Move the weights by `dlr` [], which is 0 where they stay, with the new estimate `d` []."""
    for p, state in weights:
        divisor = state["exp_avg_sq"].sqrt().add_((d * keys.eps).float())
        p.mul_((1 - keys.weight_decay * dlr).float())
        p.sub_((state["exp_avg"] / divisor).mul_(dlr.float()))
