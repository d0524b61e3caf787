"""SOAR as an objective: one base term, then the correction points in chunks, a backward for each."""

from __future__ import annotations

import math
from collections.abc import Iterator
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
    """What one batch's correction points share. Latents [B, ...], levels [B]; nothing here has a graph."""

    z0: Tensor
    eps: Tensor
    s: Tensor
    s_star: Tensor
    room: Tensor
    """Whether the step ends above sigma 0: stochastic paths need it, [B]."""
    shift: float
    cond: Condition
    v: Tensor
    """The guided velocity at (z_s, s)."""


at_most = validators.le(10_000)


@frozen
class Soar(Supervised):
    """SOAR, paper eq. 9 to 15. Reward-free: data as for SFT, 1 + paths x points supervised items a sample.

    A step costs about 1 + paths x points SFT steps and, with chunk = 1, keeps the activations of one.
    """

    points: int = field(default=6, validator=[validators.gt(0), at_most])
    """Correction points a path, N."""
    paths: int = field(default=1, validator=[validators.gt(0), at_most])
    """Off-trajectory states a sample, M: the ODE step, then M - 1 steps of the stage's `sampler`."""
    guidance: float = field(default=4.5, validator=validators.gt(0))
    """Scale of classifier-free guidance in the rollout; 1 is none."""
    steps: int = field(default=40, validator=[validators.gt(1), at_most])
    """Sampling steps K whose length the rollout step has (1/K in unshifted time)."""
    weight: float = field(default=1.0, validator=validators.ge(0))
    """lambda: weight of the correction points."""
    normalize: Literal["items", "weighted"] = "items"
    """Divide by B + N_aux, as eq. 15 reads, or by B + lambda N_aux, as the published code does."""
    chunk: int = field(default=1, validator=[validators.gt(0), at_most], metadata=ROUNDING)
    """Correction points a forward: more is up to 10 % faster and keeps the activations of as many."""
    dropout: float = field(default=0.0, validator=[validators.ge(0), validators.lt(1)])
    """Share of samples whose prompt is replaced by the empty one; their rollout is unguided."""
    noise: Literal["shared", "fresh"] = "shared"
    """Re-noise toward the sample's own noise, or toward fresh noise for each path (the paper's ablation)."""
    floor: float = field(default=0.003, validator=[validators.gt(0), validators.lt(1)])
    """Lowest sigma of a rollout's end and of its points: v_corr divides by it."""
    max_gain: float = field(default=1.0, validator=validators.gt(0))
    """Points whose target amplifies a rollout error by more count (max_gain / gain)^2; `bounded` is their share."""
    levels: Literal["continuous", "table"] = "continuous"
    """Exact sigmas, or the published code's 1000-entry table look-ups."""

    @property
    def uses(self) -> frozenset[str]:
        return frozenset({"media", "noise"} | ({"sampler"} if self.paths > 1 else set()))

    @property
    def num_terms(self) -> int:
        return 1 + self.paths * math.ceil(self.points / self.chunk) if self.weight else 1

    @property
    def rows_per_graph(self) -> int:
        return min(self.chunk, self.points)

    def terms(self, batch: Batch, ctx: Context) -> Iterator[Term]:
        z0 = batch.clean
        shift = ctx.backbone.shift(tuple(z0.shape[1:]))
        eps = ctx.randn_like(z0)
        s, s_star, room = self._levels(ctx.sigma(z0), shift)
        cond = ctx.dropout(batch.cond, self.dropout)
        z = interpolate(z0, eps, s)
        v = ctx.backbone.velocity(z, s, cond)
        base = ctx.noise.weight(s) * per_sample((v - (eps - z0)) ** 2)
        v = v.detach()
        yield Term.of(base, base=base)
        if self.weight:
            del base
            v = self._guided(z, s, cond, v, ctx)
            yield from self._corrections(Rollout(z0, eps, s, s_star, room, shift, cond, v), ctx)

    def _guided(self, z: Tensor, s: Tensor, cond: Condition, v: Tensor, ctx: Context) -> Tensor:
        """The rollout's velocity; the conditional half is the base term's own prediction."""
        import torch

        with torch.no_grad():
            return ctx.backbone.guided(z, s, cond, self.guidance, v_cond=v)

    def _corrections(self, roll: Rollout, ctx: Context) -> Iterator[Term]:
        for path in range(self.paths):
            delta, live = self._step(roll, path, ctx)
            fresh = ctx.randn_like(roll.z0) if self.noise == "fresh" else None
            for first in range(0, self.points, self.chunk):
                size = min(self.chunk, self.points - first)
                draws = [ctx.rand(len(roll.z0)).to(roll.s.device, non_blocking=True) for _ in range(size)]
                yield self._correction(roll, delta, live, fresh, draws, ctx)

    def _step(self, roll: Rollout, path: int, ctx: Context) -> tuple[Tensor, Tensor]:
        """(Delta, which rows count) of a path: the ODE's, or a draw of the sampler's transition.

        A stochastic path that would reach sigma 0 is left out, as published: it has no room for noise.
        """
        if path == 0:
            return deviation(roll.v, roll.z0, roll.eps, roll.s, roll.s_star), roll.s > 0
        z = interpolate(roll.z0, roll.eps, roll.s)
        step = ctx.sampler.step(z, roll.v, roll.s, roll.s_star)
        z = step.mean + expand_like(step.std, z) * ctx.randn_like(z)
        return z - interpolate(roll.z0, roll.eps, roll.s_star), roll.room

    def _correction(
        self,
        roll: Rollout,
        delta: Tensor,
        live: Tensor,
        fresh: Tensor | None,
        draws: list[Tensor],
        ctx: Context,
    ) -> Term:
        """The term of one chunk: a forward on len(draws) x B states, point by point."""
        import torch

        levels = [roll.s_star + u * (1 - roll.s_star) for u in draws]
        pairs = [renoised(roll.z0, roll.eps, delta, roll.s_star, level, fresh) for level in levels]
        z, target = (torch.cat(each) for each in zip(*pairs, strict=True))
        level, cond, count = torch.cat(levels), roll.cond.repeat(len(draws)), len(draws)
        v = ctx.backbone.velocity(z, self._told(level, roll.shift), cond)
        bound = (self.max_gain / gain(roll.s.repeat(count), roll.s_star.repeat(count), level)).clamp(max=1) ** 2
        loss = bound * ctx.noise.weight(level) * per_sample((v - target) ** 2)
        counts = live.repeat(count)
        loss = loss.where(counts, 0)
        items = live.sum() * count * (self.weight if self.normalize == "weighted" else 1.0)
        metrics = {"correction": loss.detach(), "loss": loss.detach(), "bounded": ((bound < 1) & counts).float()}
        return Term(loss.sum() * self.weight, items, metrics)

    def _levels(self, sigma: Tensor, shift: float) -> tuple[Tensor, Tensor, Tensor]:
        """(s, s*, whether s* is above 0) of drawn noise levels sigma, each [B]."""
        if self.levels == "table":
            t = unshifted(sigma, shift)
            lower = (t - 1 / self.steps).clamp(min=0)
            return table.sigma_at(t, shift), table.sigma_at(lower, shift), lower > 0
        s = sigma.clamp(min=self.floor)
        return s, next_level(s, shift, self.steps, self.floor), next_time(s, shift, self.steps) > 0

    def _told(self, level: Tensor, shift: float) -> Tensor:
        """The level of a correction point as the model is told it."""
        return table.told(level, shift) if self.levels == "table" else level
