"""The objective SOAR: one base term, and then a term for each chunk of correction points."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from attrs import field, frozen, validators

from corefit import ROUNDING, Batch, Condition, Context, Supervised, Term
from corefit.flow import expand_like, interpolate, per_sample, unshifted
from corefit_soar import table
from corefit_soar.geometry import deviation, gain, next_level, next_time, renoised

if TYPE_CHECKING:
    from torch import Tensor


@frozen(eq=False)
class Rollout:
    """What all correction points of a batch have in common: latents [B, ...] and levels [B], without gradients."""

    z0: Tensor
    eps: Tensor
    s: Tensor
    s_star: Tensor
    above_zero: Tensor
    """[B] bool: whether the step ends above sigma 0, as stochastic paths must."""
    shift: float
    cond: Condition
    v: Tensor
    """The guided velocity at (z_s, s)."""


at_most = validators.le(10_000)


@frozen
class Soar(Supervised):
    """SOAR, eq. 9 to 15 of the paper. It needs the data of SFT, and no reward.

    Each sample gives 1 + paths x points supervised items. A step costs about as much as that many SFT steps, and with
    chunk = 1 it keeps the activations of one.
    """

    points: int = field(default=6, validator=[validators.gt(0), at_most])
    """Correction points per path, N."""
    paths: int = field(default=1, validator=[validators.gt(0), at_most])
    """Off-trajectory states per sample, M: one from the ODE's step, M - 1 from steps of the stage's `sampler`."""
    guidance: float = field(default=4.5, validator=validators.gt(0))
    """Scale of classifier-free guidance in the rollout; 1 means no guidance."""
    steps: int = field(default=40, validator=[validators.gt(1), at_most])
    """Number of sampling steps K that determines the length of the rollout's step: 1/K in unshifted time."""
    weight: float = field(default=1.0, validator=validators.ge(0))
    """Weight of the correction points, lambda."""
    displacement: float = field(default=1.0, validator=[validators.ge(0), validators.le(10)])
    """Factor by which the step's distance off the trajectory is multiplied. With 0 there is no rollout, and the points
    lie on the trajectory, at the noise levels that SOAR's have: a control that tells the states from the levels."""
    normalize: Literal["items", "weighted"] = "items"
    """Divide the loss by B + N_aux, as in eq. 15, or by B + lambda N_aux, as in the published code."""
    chunk: int | None = field(
        default=None, validator=validators.optional([validators.gt(0), at_most]), metadata=ROUNDING
    )
    """Correction points per forward: more are up to 10 % faster, and their activations are kept together. By default
    as many as fit into a GPU's memory, and one on a CPU."""
    dropout: float = field(default=0.0, validator=[validators.ge(0), validators.lt(1)])
    """Share of samples whose prompt is replaced by the empty prompt; their rollout has no guidance."""
    noise: Literal["shared", "fresh"] = "shared"
    """Re-noise with the noise of the sample, or with fresh noise for each path (the paper's ablation)."""
    floor: float = field(default=0.003, validator=[validators.gt(0), validators.lt(1)])
    """Lowest sigma at the end of a rollout and of its points, because v_corr is divided by sigma."""
    max_gain: float = field(default=1.0, validator=validators.gt(0))
    """Points whose target amplifies an error of the rollout by more than this are weighted by (max_gain / gain)^2."""
    levels: Literal["continuous", "table"] = "continuous"
    """Exact sigmas, or look-ups in a table of 1000 as in the published code."""

    @property
    def uses(self) -> frozenset[str]:
        return frozenset({"media", "noise"} | ({"stochastic"} if self.paths > 1 else set()))

    @property
    def num_terms(self) -> int:
        return 1 + self.paths * math.ceil(self.points / self._chunk) if self.weight else 1

    @property
    def rows_per_graph(self) -> int:
        return min(self._chunk, self.points)

    @property
    def chunks(self) -> Mapping[str, int]:
        return {"chunk": self.points} if self.chunk is None else {}

    @property
    def _chunk(self) -> int:
        return self.chunk or 1

    def terms(self, batch: Batch, ctx: Context) -> Iterator[Term]:
        z0 = batch.clean
        shift = ctx.backbone.shift(tuple(z0.shape[1:]))
        eps = ctx.randn_like(z0)
        s, s_star, above_zero = self._levels(ctx.sigma(z0), shift)
        cond = ctx.dropout(batch.cond, self.dropout)
        z = interpolate(z0, eps, s)
        v = ctx.backbone.velocity(z, s, cond)
        base = ctx.noise.weight(s) * per_sample((v - (eps - z0)) ** 2)
        v = v.detach()
        yield Term.of(base, base=base)
        if self.weight:
            del base
            v = self._guided(z, s, cond, v, ctx) if self.displacement else v
            yield from self._corrections(Rollout(z0, eps, s, s_star, above_zero, shift, cond, v), ctx)

    def _guided(self, z: Tensor, s: Tensor, cond: Condition, v: Tensor, ctx: Context) -> Tensor:
        """The guided velocity of the rollout; its conditional part v is the prediction of the base term."""
        import torch

        with torch.no_grad():
            return ctx.backbone.guided(z, s, cond, self.guidance, v_cond=v)

    def _corrections(self, roll: Rollout, ctx: Context) -> Iterator[Term]:
        for path in range(self.paths):
            delta, live = self._step(roll, path, ctx)
            fresh = ctx.randn_like(roll.z0) if self.noise == "fresh" else None
            for first in range(0, self.points, self._chunk):
                size = min(self._chunk, self.points - first)
                draws = [ctx.rand(len(roll.z0)).to(roll.s.device, non_blocking=True) for _ in range(size)]
                yield self._correction(roll, delta, live, fresh, draws, ctx)

    def _step(self, roll: Rollout, path: int, ctx: Context) -> tuple[Tensor, Tensor]:
        """Delta [B, ...] of a path, and a mask [B] of the rows that count.

        The first path is the ODE's step, the others are drawn from the sampler's transition. As in the published code,
        rows in which a stochastic path would end at sigma 0 are left out, because there is no noise at that level.
        """
        if path == 0:
            delta = deviation(roll.v, roll.z0, roll.eps, roll.s, roll.s_star)
            return delta * self.displacement, roll.s > 0
        z = interpolate(roll.z0, roll.eps, roll.s)
        step = ctx.sampler.step(z, roll.v, roll.s, roll.s_star)
        z = step.mean + expand_like(step.std, z) * ctx.randn_like(z)
        return (z - interpolate(roll.z0, roll.eps, roll.s_star)) * self.displacement, roll.above_zero

    def _correction(
        self,
        roll: Rollout,
        delta: Tensor,
        live: Tensor,
        fresh: Tensor | None,
        draws: list[Tensor],
        ctx: Context,
    ) -> Term:
        """The term of one chunk: one forward on len(draws) x B states, ordered by point."""
        import torch

        levels = [roll.s_star + u * (1 - roll.s_star) for u in draws]
        pairs = [renoised(roll.z0, roll.eps, delta, roll.s_star, level, fresh) for level in levels]
        z, target = (torch.cat(each) for each in zip(*pairs, strict=True))
        level, cond, count = torch.cat(levels), roll.cond.repeat(len(draws)), len(draws)
        v = ctx.backbone.velocity(z, self._model_level(level, roll.shift), cond)
        bound = (self.max_gain / gain(roll.s.repeat(count), roll.s_star.repeat(count), level)).clamp(max=1) ** 2
        loss = bound * ctx.noise.weight(level) * per_sample((v - target) ** 2)
        counts = live.repeat(count)
        loss = loss.where(counts, 0)
        items = live.sum() * count * (self.weight if self.normalize == "weighted" else 1.0)
        metrics = {"correction": loss.detach(), "loss": loss.detach(), "bounded": ((bound < 1) & counts).float()}
        return Term(loss.sum() * self.weight, items, metrics)

    def _levels(self, sigma: Tensor, shift: float) -> tuple[Tensor, Tensor, Tensor]:
        """(s, s*, whether the step ends above sigma 0) for drawn noise levels sigma, each [B]."""
        if self.levels == "table":
            t = unshifted(sigma, shift)
            lower = (t - 1 / self.steps).clamp(min=0)
            return table.sigma_at(t, shift), table.sigma_at(lower, shift), lower > 0
        s = sigma.clamp(min=self.floor)
        return s, next_level(s, shift, self.steps, self.floor), next_time(s, shift, self.steps) > 0

    def _model_level(self, level: Tensor, shift: float) -> Tensor:
        """The level [B] that the model is given for correction points at `level` [B]."""
        return table.model_sigma(level, shift) if self.levels == "table" else level
