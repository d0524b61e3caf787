"""Rollouts that keep their transitions, for policy gradients; and the noise that samples of a batch start from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from corefit.flow import expand_like
from corefit.rollout.loop import rollout
from corefit.rollout.samplers import Ode
from corefit.types import Backbone, Batch, Sampler
from corefit.types.objective import Context
from corefit.types.scoring import Scoring

if TYPE_CHECKING:
    from torch import Tensor


@frozen(eq=False)
class Recording:
    """Holds T consecutive transitions of each of B rollouts, and what the rollouts ended in.

    states     [B, T + 1, ...] float32, exactly as the policy saw them
    sigmas     [B, T + 1], the noise levels of the states
    log_probs  [B, T], the log-probabilities of states[:, 1:] under the policy of the rollout
    x0         [B, ...], the final latents
    means      [B, T, ...], the means of the transitions under the policy of the rollout; None unless asked for
    """

    states: Tensor
    sigmas: Tensor
    log_probs: Tensor
    x0: Tensor
    means: Tensor | None = None


def initial_noise(batch: Batch, ctx: Context, group: int = 1) -> Tensor:
    """Draw the noise [B, ...] that the rows start from, on the device of the batch; it is keyed by the row.

    group  the number of consecutive rows that start from the same noise, as in DanceGRPO; 1 for noise of their own
    """
    rng = ctx.rng.of("start", [row // group for row in batch.rows]) if group > 1 else ctx.rng
    device = next(iter(batch.cond.tensors.values())).device
    return rng.randn((len(batch), *batch.shape)).to(device, non_blocking=True)


def sample_states(
    batch: Batch,
    ctx: Context,
    index: Tensor,
    *,
    sampler: Sampler,
    steps: int,
    guidance: float = 1.0,
    backbone: Backbone | None = None,
    group: int = 1,
    scoring: Scoring | None = None,
) -> Tensor:
    """Roll out the rows of a batch, and return n states [B, n, ...] of each row's trajectory, without a graph.

    It works in slices of `ctx.micro_batch` rows, and its draws are keyed by the row.

    index     [B, n], the position of each state in the grid of sigmas: 0 is the noise, `steps` is the clean sample
    backbone  the policy that samples: `ctx.backbone` by default
    group     the number of consecutive rows that start from the same noise; 1 for noise of their own
    scoring   scores the last of the n states of each slice while the next slice is sampled
    """
    import torch

    policy, sigmas, found = backbone or ctx.backbone, ctx.backbone.sigmas(steps, batch.shape), list[torch.Tensor]()
    with torch.no_grad():
        for first in range(0, len(batch), ctx.micro_batch):
            rows = slice(first, first + ctx.micro_batch)
            part, local = batch[rows], ctx.at(ctx.rng[rows])
            x = initial_noise(part, local, group)
            wanted, states = index[rows].to(x.device, non_blocking=True), torch.stack([x] * index.shape[1], 1)
            taken = rollout(policy, sampler, x, part.cond, sigmas, guidance=guidance, randn_like=local.randn_like)
            for i, transition in enumerate(taken, 1):
                states = transition.x_next.unsqueeze(1).where(expand_like(wanted == i, states), states)
            found.append(states)
            if scoring is not None:
                scoring.add(states[:, -1])
    return torch.cat(found)


def record(
    batch: Batch,
    ctx: Context,
    *,
    steps: int,
    length: int,
    guidance: float,
    window: Tensor | None = None,
    group: int = 1,
    means: bool = False,
    scoring: Scoring | None = None,
) -> Recording:
    """Roll out the rows of a batch with `ctx.sampler`, and keep `length` transitions of each, without a graph.

    It works in slices of `ctx.micro_batch` rows, and its draws are keyed by the row. So neither the micro-batch nor the
    number of ranks changes a rollout. Call it on all ranks.

    window  [B] on the CPU, the first kept step of each row; only kept steps are stochastic, all others are the ODE's.
            Without it all steps are stochastic, and the first ones are kept
    group   the number of consecutive rows that start from the same noise; 1 for noise of their own. The steps before
            the first window of the batch are then equal in a group, and are taken once for each group
    means   whether to keep the means of the transitions, which take as much memory as the states
    scoring  scores the final latents of each slice while the next slice is rolled out
    """
    import torch

    sigmas = ctx.backbone.sigmas(steps, batch.shape)
    prefix = 0 if window is None or group == 1 else int(ctx.gather(window).min())
    parts: list[Recording] = []
    with torch.no_grad():
        heads = _walk(batch, ctx, sigmas[: prefix + 1], guidance, group) if prefix else None
        for first in range(0, len(batch), ctx.micro_batch):
            rows = slice(first, first + ctx.micro_batch)
            part, local = batch[rows], ctx.at(ctx.rng[rows])
            x = initial_noise(part, local, group) if heads is None else heads[rows]
            local.rng.draws += prefix  # so that a step's noise does not depend on where the steps before were taken
            start = None if window is None else window[rows] - prefix
            parts.append(_record(part, local, x, sigmas[prefix:], guidance, start, length, means))
            if scoring is not None:
                scoring.add(parts[-1].x0)
    return Recording(
        torch.cat([part.states for part in parts]),
        torch.cat([part.sigmas for part in parts]),
        torch.cat([part.log_probs for part in parts]),
        torch.cat([part.x0 for part in parts]),
        torch.cat([part.means for part in parts if part.means is not None]) if means else None,
    )


def _walk(batch: Batch, ctx: Context, sigmas: Tensor, guidance: float, group: int) -> Tensor:
    """Take the ODE's steps from sigmas[0] to sigmas[-1] once for each group; return the states [B, ...] of all rows."""
    import torch

    heads = list(range(0, len(batch), group))
    noise, cond = initial_noise(batch, ctx, group)[heads], batch.cond[heads]
    ends: list[Tensor] = []
    for first in range(0, len(heads), ctx.micro_batch):
        rows = slice(first, first + ctx.micro_batch)
        x = noise[rows]
        for transition in rollout(ctx.backbone, Ode(), x, cond[rows], sigmas, guidance=guidance):
            x = transition.x_next
        ends.append(x)
    return torch.cat(ends).repeat_interleave(group, 0)


def _record(
    batch: Batch,
    ctx: Context,
    x: Tensor,
    sigmas: Tensor,
    guidance: float,
    window: Tensor | None,
    length: int,
    keep_means: bool,
) -> Recording:
    """Roll out one micro-batch from x [B, ...], and keep `length` transitions of each row."""
    import torch

    sigmas = sigmas.to(x.device, non_blocking=True)
    start = torch.zeros(len(x), dtype=torch.long) if window is None else window
    index = (start[:, None] + torch.arange(length + 1)).to(x.device, non_blocking=True)
    row = torch.arange(len(x), device=x.device)[:, None]
    inside = (torch.arange(len(sigmas) - 1)[:, None] - start).to(x.device, non_blocking=True)
    states, log_probs, means = [x], list[torch.Tensor](), list[torch.Tensor]()
    for transition in rollout(
        ctx.backbone,
        ctx.sampler,
        x,
        batch.cond,
        sigmas,
        guidance=guidance,
        randn_like=ctx.randn_like,
        stochastic=None if window is None else (inside >= 0) & (inside < length),
    ):
        states.append(transition.x_next)
        log_probs.append(ctx.sampler.log_prob(transition.x_next, transition.step))
        if keep_means:
            means.append(transition.step.mean)
    return Recording(
        torch.stack(states, 1)[row, index],
        sigmas[index],
        torch.stack(log_probs, 1)[row, index[:, :-1]],
        states[-1],
        torch.stack(means, 1)[row, index[:, :-1]] if keep_means else None,
    )
