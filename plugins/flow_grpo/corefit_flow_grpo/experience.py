"""The experience that Flow-GRPO trains on: groups of rollouts and their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from attrs import evolve, frozen

from corefit import Batch, Condition, Context
from corefit.rollout import rollout
from corefit.types import rewards

if TYPE_CHECKING:
    from torch import Tensor


@frozen(eq=False)
class Rollouts:
    """B rollouts, each with the T consecutive transitions that are trained.

    states       [B, T + 1, ...] float32, exactly as the policy saw them: nothing is rounded before training
    sigmas       [B, T + 1], the noise levels of the states
    log_probs    [B, T], log-probabilities of states[:, 1:] under the policy of the rollout
    advantages   [B]
    informative  [B] bool, whether a row's group has variance; other rows have no gradient and are not counted
    rows         global numbers of the rollouts, as in `Batch.rows`
    update       number of the optimizer step on this batch, from 0
    """

    states: Tensor
    sigmas: Tensor
    log_probs: Tensor
    advantages: Tensor
    informative: Tensor
    cond: Condition
    rows: Sequence[int]
    update: int = 0
    metrics: Mapping[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice) -> Rollouts:
        return self.take(list(range(len(self))[rows]))

    def take(self, index: Sequence[int]) -> Rollouts:
        """The rows in `index`, without the metrics of the experience."""
        return Rollouts(
            self.states[index],
            self.sigmas[index],
            self.log_probs[index],
            self.advantages[index],
            self.informative[index],
            self.cond[index],
            [self.rows[i] for i in index],
            self.update,
        )


@frozen(eq=False)
class Recording:
    """States, noise levels, log-probabilities and final latents of one micro-batch's rollout."""

    states: Tensor
    sigmas: Tensor
    log_probs: Tensor
    x0: Tensor


def record(
    batch: Batch,
    noise: Tensor,
    ctx: Context,
    start: Tensor,
    *,
    steps: int,
    length: int,
    guidance: float,
    windowed: bool,
) -> Recording:
    """Roll out a micro-batch and keep `length` transitions of each row, from step start [B] on.

    windowed  whether only these transitions are stochastic (Flow-GRPO-Fast), or all are
    """
    import torch

    sigmas = ctx.backbone.sigmas(steps, batch.shape).to(noise.device)
    inside = _window(start, length, steps) if windowed else None
    states, log_probs = [noise], []
    for t in rollout(
        ctx.backbone,
        ctx.sampler,
        noise,
        batch.cond,
        sigmas,
        guidance=guidance,
        randn_like=ctx.randn_like,
        stochastic=inside,
    ):
        states.append(t.x_next)
        log_probs.append(ctx.sampler.log_prob(t.x_next, t.step))
    index = start[:, None] + torch.arange(length + 1, device=start.device)
    row = torch.arange(len(batch), device=start.device)[:, None]
    return Recording(
        torch.stack(states, 1)[row, index],
        sigmas[index],
        torch.stack(log_probs, 1)[row, index[:, :-1]],
        states[-1],
    )


def score(x0: Tensor, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
    """Scores [B] of clean latents x0 [B, ...] by the name of the reward; float64, CPU."""
    media = ctx.backbone.decode(x0)
    return {entry.name: rewards.score(entry, media, batch.prompts, batch.meta) for entry in ctx.rewards}


def _window(start: Tensor, length: int, steps: int) -> Tensor:
    """[steps, B] bool: whether a step is in the window of the row."""
    import torch

    step = torch.arange(steps, device=start.device)[:, None]
    return (step >= start) & (step < start + length)


def joined(parts: Sequence[Recording]) -> Recording:
    """Concatenate the recordings of consecutive micro-batches."""
    import torch

    return Recording(
        torch.cat([p.states for p in parts]),
        torch.cat([p.sigmas for p in parts]),
        torch.cat([p.log_probs for p in parts]),
        torch.cat([p.x0 for p in parts]),
    )


def for_update(rollouts: Rollouts, update: int, index: Sequence[int], metrics: Mapping[str, Tensor]) -> Rollouts:
    """The rows that optimizer step `update` of this batch trains on."""
    return evolve(rollouts.take(index), update=update, metrics=metrics if update == 0 else {})
