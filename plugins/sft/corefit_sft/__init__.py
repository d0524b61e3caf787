"""Supervised fine-tuning (SFT) by flow matching."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attrs import field, frozen, validators

from corefit import Batch, Context, Objective, Offers, Supervised, Term, hookimpl
from corefit.flow import interpolate, per_sample


@frozen
class Sft(Supervised):
    """Rectified-flow matching (arXiv 2403.03206, eq. 5): mean over samples of w(sigma) |v - (noise - x0)|^2."""

    dropout: float = field(default=0.0, validator=[validators.ge(0), validators.lt(1)])
    """Share of samples whose prompt is replaced by the empty prompt."""

    def terms(self, batch: Batch, ctx: Context) -> Iterator[Term]:
        x0 = batch.clean
        noise, sigma = ctx.randn_like(x0), ctx.sigma(x0)
        cond = ctx.dropout(batch.cond, self.dropout)
        v = ctx.backbone.velocity(interpolate(x0, noise, sigma), sigma, cond)
        yield Term.of(ctx.noise.weight(sigma) * per_sample((v - (noise - x0)) ** 2))


@hookimpl
def corefit_objectives() -> Offers[Objective[Any]]:
    return {"sft": Sft}
