"""plugin_name, an objective for corefit: flow matching with the Huber loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attrs import field, frozen, validators

from corefit import Batch, Context, Objective, Offers, Supervised, Term, hookimpl
from corefit.flow import interpolate, per_sample

COREFIT_API = "1.0"


@frozen
class PluginName(Supervised):
    """Flow matching with the Huber loss: squared errors up to `delta`, absolute ones above."""

    delta: float = field(default=0.1, validator=validators.gt(0))
    """Size of the error at which the loss changes from squared to absolute."""

    def terms(self, batch: Batch, ctx: Context) -> Iterator[Term]:
        x0 = batch.clean  # [B, ...]: pictures, clips or tokens; no shape is assumed
        noise, sigma = ctx.randn_like(x0), ctx.sigma(x0)  # the same on any number of GPUs, and after a resume
        v = ctx.backbone.velocity(interpolate(x0, noise, sigma), sigma, batch.cond)
        error = (v - (noise - x0)).abs()
        squared, absolute = error**2 / 2, self.delta * (error - self.delta / 2)
        loss = per_sample(squared.where(error < self.delta, absolute))  # [B]
        # Term.of sums over the rows; other keywords are logged as means
        yield Term.of(ctx.noise.weight(sigma) * loss, large=per_sample((error >= self.delta).float()))


@hookimpl
def corefit_objectives() -> Offers[Objective[Any]]:
    return {"plugin_name": PluginName}
