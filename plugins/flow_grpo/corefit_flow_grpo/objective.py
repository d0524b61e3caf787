"""The objective Flow-GRPO: rollouts in groups give advantages, and each trained sampling step is a term."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal

from attrs import evolve, field, fields, frozen, validators

from corefit import Batch, Context, Step, Term
from corefit.rollout import (
    Grouped,
    each_advantages,
    group_advantages,
    informative_rows,
    record,
    require_on_policy,
    score_metrics,
    share_rows,
)
from corefit.types import Scores
from corefit_flow_grpo.experience import Rollouts
from corefit_flow_grpo.loss import divergence, policy_loss

if TYPE_CHECKING:
    from torch import Tensor

at_least_one, at_most = validators.ge(1), validators.le(10_000)
above_zero = validators.gt(0.0)


@frozen
class FlowGrpo(Grouped[Rollouts]):
    """Flow-GRPO, eq. 4 to 9 of the paper. It needs prompts, a stochastic `sampler` and a `reward`, but no media."""

    steps: int = field(default=10, validator=[validators.ge(2), at_most])
    """Number of sampling steps of a rollout."""
    guidance: float = field(default=4.5, validator=above_zero)
    """Scale of classifier-free guidance. The policy is the guided velocity, in the rollout and in training."""
    start: Literal["own", "shared"] = "own"
    """Initial noise for each rollout (Flow-GRPO), or the same for a whole group (DanceGRPO, MixGRPO)."""
    detach_unconditional: bool = False
    """Stop the gradient through the unconditional part of guidance, as in the published code of July 2025."""
    ratio: Literal["plain", "guard"] = "plain"
    """The ratio of policy and rollout as it is, or normalized and its loss divided by |dt| (GRPO-Guard)."""
    clip: float = field(default=1e-4, validator=above_zero)
    """Clip range of the ratio. It is small because log-probabilities are means over dimensions."""
    clip_high: float | None = field(default=None, validator=validators.optional(above_zero))
    """Upper clip range if it differs from `clip`."""
    advantage_clip: float = field(default=5.0, validator=above_zero)
    """Advantages are clamped to [-advantage_clip, advantage_clip]."""
    std: Literal["global", "group", "each"] = "global"
    """Divide by the standard deviation of all rewards of the batch (published code), of the group's (paper), or of each
    reward's scores in the group, and that of the weighted sum over the batch (GDPO)."""
    zero_variance: Literal["drop", "keep"] = "drop"
    """Leave groups whose rewards are all equal out of the mean and of the work, or keep them in the mean as 0."""
    fraction: float | None = field(default=None, validator=validators.optional([above_zero, validators.lt(1.0)]))
    """Share of the steps that are trained, from the first on; 0.99 (all but the last) unless `window` is given."""
    window: int | None = field(default=None, validator=validators.optional(at_least_one))
    """Number of consecutive steps that are trained; only these are stochastic (Flow-GRPO-Fast, MixGRPO)."""
    window_range: tuple[int, int] | None = None
    """Range [low, high) of steps in which the window lies; by default the first half of the steps, or all but the last
    for a progressive window."""
    strategy: Literal["random", "progressive"] = "random"
    """Draw a window for each group (for the batch if the start is shared), or move it from early to late (MixGRPO)."""
    interval: int | None = field(default=None, validator=validators.optional(at_least_one))
    """Number of training steps between moves of a progressive window, tau in MixGRPO; 25 by default."""
    stride: int | None = field(default=None, validator=validators.optional(at_least_one))
    """Number of sampling steps by which a progressive window moves, s in MixGRPO; 1 by default."""
    decay: float | None = field(default=None, validator=validators.optional(above_zero))
    """Rate k at which the interval shrinks once the window is in the second half of the steps; constant by default."""
    beta: float = field(default=0.0, validator=validators.ge(0))
    """Weight of the KL to the policy at the start of the stage."""
    kl: Literal["exact", "published"] = "exact"
    """The KL of the Gaussians, or that of the published SD3 script, which is |dt| times as large."""
    ratio_tolerance: float | None = field(default=None, validator=validators.optional(above_zero))
    """Largest |log ratio| allowed before the first update, where training and rollout must agree; default `clip`."""

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        moves = self.strategy == "progressive"
        for key, read, needed in (
            ("window_range", self.window, "'window': say how many steps the window has"),
            ("strategy", self.window, "'window': say how many steps the window has"),
            ("interval", moves, "'strategy' = \"progressive\": a window that is drawn anew has none"),
            ("stride", moves, "'strategy' = \"progressive\": a window that is drawn anew has none"),
            ("decay", moves, "'strategy' = \"progressive\": it shortens that window's 'interval'"),
            ("kl", self.beta, "'beta' above 0: without it no KL is computed"),
        ):
            if not read and getattr(self, key) != getattr(fields(FlowGrpo), key).default:
                raise ValueError(f"'{key}' needs {needed}; or remove '{key}'")
        if self.window is not None and self.fraction is not None:
            raise ValueError("'fraction' and 'window' both choose the trained steps: remove one")
        low, high = self._range
        if not 0 <= low <= high - self._length or high > self.steps - 1:
            raise ValueError(
                f"{self._length} trained steps do not fit into steps {low} to {high - 1}; the last of the "
                f"{self.steps} 'steps' is never trained"
            )

    @property
    def uses(self) -> frozenset[str]:
        return frozenset({"stochastic", "reward"} | ({"reference"} if self.beta else set()))

    @property
    def num_terms(self) -> int:
        return self._length

    @property
    def rows_per_graph(self) -> int:
        return 1 if self.guidance == 1 else 2

    @property
    def latents_per_row(self) -> int:
        """Return the states that a rollout keeps, and their means, twice: all of them, and those of an update."""
        return 1 + 2 * (self._length + 1 + self._length * self.keeps_means)

    @property
    def keeps_means(self) -> bool:
        """Whether rollouts keep the means of their transitions, which `log_ratio` then finds in `part.means`."""
        return self.ratio == "guard"

    @property
    def _length(self) -> int:
        fraction = 0.99 if self.fraction is None else self.fraction
        return self.window or max(1, min(int(self.steps * fraction), self.steps - 1))

    @property
    def _range(self) -> tuple[int, int]:
        if self.window is None or self.window_range is not None:
            return self.window_range or (0, self._length)
        last = self.steps - 1
        return 0, last if self.strategy == "progressive" else min(max(self.steps // 2, self.window), last)

    def experience(self, batch: Batch, ctx: Context) -> Iterable[Rollouts]:
        import torch

        with ctx.scoring(batch) as scoring:
            taken = record(
                batch,
                ctx,
                steps=self.steps,
                length=self._length,
                guidance=self.guidance,
                window=None if self.window is None else self.first_steps(batch, ctx),
                group=self.group if self.start == "shared" else 1,
                means=self.keeps_means,
                scoring=scoring,
            )
            scores = scoring.result()
        advantage = self.advantages(scores, batch, ctx)
        informative = informative_rows(advantage, self.group)
        kept = informative if self.zero_variance == "drop" else torch.ones_like(informative)
        rollouts = Rollouts(
            taken.states,
            taken.sigmas,
            taken.log_probs,
            advantage.float().clamp(-self.advantage_clip, self.advantage_clip).to(taken.x0.device, non_blocking=True),
            kept.to(taken.x0.device, non_blocking=True),
            batch.cond,
            batch.rows,
            means=taken.means,
        )
        for update, index in enumerate(share_rows(kept, ctx, self.group, epochs=self.epochs, updates=self.updates)):
            metrics = {} if update else score_metrics(scores, informative)
            yield evolve(rollouts.take(index), update=update, metrics=metrics)

    def terms(self, part: Rollouts, ctx: Context) -> Iterator[Term]:
        for j in range(self._length):
            yield self._term(part, j, ctx)

    def first_steps(self, batch: Batch, ctx: Context) -> Tensor:
        """Return the first step [B] of each row's window, on the CPU; it is equal within a group."""
        import torch

        low, last = self._range[0], self._range[1] - self._length
        if self.strategy == "random":
            groups = [0 if self.start == "shared" else row // self.group for row in batch.rows]
            return ctx.rng.of("window", groups).integers(low, last + 1)
        left = ctx.step
        for first in range(low, last, self.stride or 1):
            late = max(0, first - math.ceil(self.steps / 2))
            left -= math.ceil((self.interval or 25) * math.exp(-(self.decay or 0) * late))
            if left < 0:
                return torch.full((len(batch),), first)
        return torch.full((len(batch),), last)

    def advantages(self, scores: Scores, batch: Batch, ctx: Context) -> Tensor:
        """Return the advantages [B] of this rank's rows, with statistics over all ranks; 0 in groups to leave out."""
        if self.std == "each":
            return each_advantages(scores, batch, ctx, self.group)
        return group_advantages(scores.total, batch, ctx, self.group, global_std=self.std == "global")

    def log_ratio(self, step: Step, part: Rollouts, j: int, ctx: Context) -> Tensor:
        """Return the logarithm [B] of the ratio that is clipped, for transition j, which is now `step`."""
        plain = ctx.sampler.log_prob(part.states[:, j + 1], step) - part.log_probs[:, j]
        if self.ratio == "plain" or part.means is None:
            return plain
        shift = divergence(step.mean, part.means[:, j], step.std, step.std, "exact")
        return step.std * (plain + shift)  # RatioNorm, GRPO-Guard eq. 8

    def _term(self, part: Rollouts, j: int, ctx: Context) -> Term:
        """The clipped objective (eq. 5) of transition j, summed over the informative rows."""
        x, sigma, sigma_next = part.states[:, j], part.sigmas[:, j], part.sigmas[:, j + 1]
        reference = self._reference(x, sigma, sigma_next, part, ctx)
        step = ctx.sampler.step(x, self._velocity(x, sigma, part, ctx), sigma, sigma_next)
        log_ratio = self.log_ratio(step, part, j, ctx)
        if ctx.first_batch and part.update == 0:
            require_on_policy(log_ratio, self.ratio_tolerance or self.clip, "ratio_tolerance")
        ratio, high = log_ratio.exp(), self.clip if self.clip_high is None else self.clip_high
        loss = policy_loss(ratio, part.advantages, self.clip, high)
        if self.ratio == "guard":
            loss = loss / (sigma - sigma_next)
        metrics = {
            "ratio": ratio,
            "clipped": ((ratio < 1 - self.clip) | (ratio > 1 + high)).float(),
            "approx_kl": log_ratio**2 / 2,
        }
        if reference is not None:
            kl = divergence(step.mean, reference.mean, step.std, sigma_next - sigma, self.kl)
            loss, metrics["kl"] = loss + self.beta * kl, kl
        metrics = {name: value.detach() for name, value in {"loss": loss, **metrics}.items()}
        return Term(loss.where(part.informative, 0).sum(), part.informative.sum(), metrics)

    def _velocity(self, x: Tensor, sigma: Tensor, part: Rollouts, ctx: Context) -> Tensor:
        import torch

        backbone = ctx.backbone
        # a distilled model has no unconditional part: its guidance scale is an input
        if not self.detach_unconditional or backbone.distilled or self.guidance == 1:
            return backbone.guided(x, sigma, part.cond, self.guidance)
        v = backbone.velocity(x, sigma, part.cond)
        with torch.no_grad():
            v_null = backbone.velocity(x, sigma, backbone.null(len(x)))
        return backbone.combine(v, v_null, self.guidance)

    def _reference(self, x: Tensor, sigma: Tensor, sigma_next: Tensor, part: Rollouts, ctx: Context) -> Step | None:
        import torch

        if ctx.reference is None:
            return None
        with torch.no_grad():
            v = ctx.reference.guided(x, sigma, part.cond, self.guidance)
            return ctx.sampler.step(x, v, sigma, sigma_next)
