"""ReflexFlow (arXiv 2512.04904) as a corefit objective: flow matching that sees its own drift and corrects it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from attrs import field, frozen, validators
from torch import Tensor

from corefit import Batch, Context, Objective, Offers, Supervised, Term, hookimpl
from corefit.flow import expand_like, interpolate, per_sample

COREFIT_API = "1.0"
share = [validators.ge(0), validators.le(1)]


@frozen
class ReflexFlow(Supervised):
    """Scheduled sampling with anti-drift rectification (ADR) and frequency compensation (FC).

    A step of the model itself, without gradient, leads from a noisier point of the sample's path to a drifted state.
    There ADR turns the prediction towards the clean sample, and FC counts more what the drift has changed most.
    Departure from the paper: the compensation is normalised by its mean, not its sum, so that `alpha` does not depend
    on the resolution.
    """

    reach: float = field(default=0.2, validator=share)
    """Longest step that drifts, as a share of the way from the sample's noise level up to 1."""
    rectify: float = field(default=1.0, validator=validators.ge(0))
    """Weight of ADR."""
    alpha: float = field(default=1.0, validator=validators.ge(0))
    """Strength of FC; 0 weighs all alike."""
    dropout: float = field(default=0.0, validator=share)
    """Share of samples whose prompt is replaced by the empty one."""

    def terms(self, batch: Batch, ctx: Context) -> Iterator[Term]:
        x0 = batch.clean
        noise, sigma, cond = ctx.randn_like(x0), ctx.sigma(x0), ctx.dropout(batch.cond, self.dropout)
        target, straight = noise - x0, interpolate(x0, noise, sigma)
        with torch.no_grad():
            above = sigma + (1 - sigma) * self.reach * ctx.rand(len(x0)).to(sigma.device, non_blocking=True)
            start = interpolate(x0, noise, above)
            drifted = start + expand_like(sigma - above, x0) * ctx.backbone.velocity(start, above, cond)
            undrifted = ctx.backbone.velocity(straight, sigma, cond)
        v = ctx.backbone.velocity(drifted, sigma, cond)
        gap = (v.detach() - undrifted).abs()
        weight = 1 + self.alpha * gap / expand_like(per_sample(gap).clamp(min=1e-8), x0)
        matched = per_sample((weight * (v - target)) ** 2)
        rectified = per_sample((_direction(v) - _direction(drifted - x0)) ** 2)
        drift = per_sample((drifted - straight) ** 2).sqrt()
        yield Term.of(ctx.noise.weight(sigma) * (matched + self.rectify * rectified), drift=drift, adr=rectified)


def _direction(x: Tensor) -> Tensor:
    """x [B, ...] with a mean square of 1 in each row."""
    return x / expand_like(per_sample(x**2).clamp(min=1e-12).sqrt(), x)


@hookimpl
def corefit_objectives() -> Offers[Objective[Any]]:
    return {"reflexflow": ReflexFlow}
