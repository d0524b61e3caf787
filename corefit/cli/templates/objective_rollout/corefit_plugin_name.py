"""plugin_name, an objective for corefit: it learns from scored samples of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import field, frozen, validators

from corefit import Batch, Condition, Context, Objective, Offers, Term, hookimpl
from corefit.flow import interpolate, per_sample
from corefit.rollout import TensorPart, group_advantages, sample

if TYPE_CHECKING:
    from torch import Tensor

COREFIT_API = "1.0"


@frozen(eq=False)
class Samples(TensorPart):
    """Samples of the model [n, ...], their advantages [n], and what else belongs to each row; it can be sliced."""

    x0: Tensor
    advantage: Tensor
    cond: Condition
    rows: Sequence[int]
    metrics: Mapping[str, Tensor]


@frozen
class PluginName(Objective[Samples]):
    """Flow matching on the model's own samples, weighted by how much better each is than the others of its prompt."""

    group: int = field(default=8, validator=validators.ge(2))
    """Number of samples of each prompt."""
    steps: int = field(default=10, validator=validators.ge(1))
    """Number of sampling steps."""
    guidance: float = field(default=1.0, validator=validators.gt(0))
    """Scale of classifier-free guidance of the samples; 1 means no guidance."""

    @property
    def uses(self) -> frozenset[str]:
        return frozenset({"sampler", "reward", "noise"})

    @property
    def num_terms(self) -> int:
        return 1

    @property
    def group_size(self) -> int:
        return self.group

    def experience(self, batch: Batch, ctx: Context) -> Iterable[Samples]:
        x0 = sample(batch, ctx, steps=self.steps, guidance=self.guidance)  # the same on any number of GPUs
        scores = ctx.score(x0, batch)  # float64, on the CPU
        advantage = group_advantages(scores.total, batch, ctx, self.group)  # with statistics over all GPUs
        # one part is one optimizer step
        yield Samples(x0, advantage.to(x0), batch.cond, batch.rows, scores.metrics)

    def terms(self, part: Samples, ctx: Context) -> Iterator[Term]:
        x0 = part.x0  # [B, ...]: pictures, clips or tokens; no shape is assumed
        noise, sigma = ctx.randn_like(x0), ctx.sigma(x0)
        v = ctx.backbone.velocity(interpolate(x0, noise, sigma), sigma, part.cond)
        error = per_sample((v - (noise - x0)) ** 2)  # [B]; it is to fall on better samples, and to rise on worse ones
        # Term.of sums over the rows; other keywords are logged as means
        yield Term.of(ctx.noise.weight(sigma) * part.advantage * error, error=error)


@hookimpl
def corefit_objectives() -> Offers[Objective[Any]]:
    return {"plugin_name": PluginName}
