"""What objectives that learn from scored groups have in common: samples, advantages within groups, rows of updates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from attrs import evolve, fields

from corefit.errors import TrainingError
from corefit.rollout.recording import sample_states
from corefit.types import Backbone, Batch, Condition, Scores
from corefit.types.objective import Context
from corefit.types.scoring import Scoring

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 1e-4
"""Added to the standard deviation, as in the published code (flow_grpo, PerPromptStatTracker)."""


def sample(
    batch: Batch,
    ctx: Context,
    *,
    steps: int,
    guidance: float = 1.0,
    backbone: Backbone | None = None,
    group: int = 1,
    scoring: Scoring | None = None,
) -> Tensor:
    """Generate clean latents [B, ...] for the rows of a batch with `ctx.sampler`, without a graph.

    It works in slices of `ctx.micro_batch` rows, and its noise is keyed by the row. So neither the micro-batch nor the
    number of ranks changes a sample.

    backbone  the policy that samples: `ctx.backbone` by default, or a reference or a copy from `ctx`
    group     the number of consecutive rows that start from the same noise, as in DanceGRPO; 1 for noise of their own
    scoring   `ctx.scoring(batch)`: it scores each slice while the next one is sampled
    """
    import torch

    last = torch.full((len(batch), 1), steps)
    return sample_states(
        batch,
        ctx,
        last,
        sampler=ctx.sampler,
        steps=steps,
        guidance=guidance,
        backbone=backbone,
        group=group,
        scoring=scoring,
    )[:, 0]


def group_advantages(reward: Tensor, batch: Batch, ctx: Context, group: int, *, global_std: bool = True) -> Tensor:
    """Return the advantages [B] of this rank's rows, with statistics over all ranks; call it on all of them.

    reward  [B], such as `ctx.score(x0, batch).total`
    """
    import torch

    first = int((ctx.gather(torch.tensor(batch.rows)) < batch.rows[0]).sum())
    every = advantages(ctx.gather(reward), group, global_std=global_std)
    return every[first : first + len(batch)]


def each_advantages(scores: Scores, batch: Batch, ctx: Context, group: int) -> Tensor:
    """Return advantages [B] in which each reward counts as its weight says, whatever its spread; call it on all ranks.

    The advantages of each reward, normalized in its group, are weighted and added. The sum is normalized over the batch
    (GDPO, arXiv 2601.05242). Otherwise the reward of the largest spread rules a weighted sum.
    """
    import torch

    each = [
        entry.weight * group_advantages(scores.each[entry.name], batch, ctx, group, global_std=False)
        for entry in ctx.rewards
    ]
    return group_advantages(torch.stack(each).sum(0), batch, ctx, group)


def advantages(rewards: Tensor, group: int, *, global_std: bool) -> Tensor:
    """Return (reward - mean of its group) / (std + 1e-4), [B]: how much better a sample is than its prompt's others.

    std is the population standard deviation, over all rewards (the default of the published code) or over the group
    (Flow-GRPO, eq. 4). In a group whose rewards are equal, up to rounding, all advantages are exactly 0.

    rewards  [B]; groups are complete, and their rows consecutive
    """
    rows = rewards.reshape(-1, group)
    centered = rows - rows.mean(1, keepdim=True)
    spread = rows.std(1, correction=0, keepdim=True)
    std = rewards.std(correction=0) if global_std else spread
    constant = spread <= 1e-6 * rows.abs().amax(1, keepdim=True).clamp(min=1e-6)
    return (centered / (std + EPSILON)).masked_fill(constant, 0).reshape(-1)


def informative_rows(advantage: Tensor, group: int) -> Tensor:
    """Return [B] bool: whether there is something to learn from a row, as its group's advantages [B] are not all 0."""
    return (advantage.reshape(-1, group) != 0).any(1).repeat_interleave(group)


def score_metrics(scores: Scores, informative: Tensor) -> Mapping[str, Tensor]:
    """Return what is logged of scored groups: `reward`, `informative`, and `reward/NAME` of several rewards."""
    return {**scores.metrics, "informative": informative.double()}


def clipped_loss(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Return PPO's clipped loss [B], max(-A ratio, -A clamp(ratio, 1 - low, 1 + high)), for advantages A [B]."""
    return (-advantages * ratio).maximum(-advantages * ratio.clamp(1 - low, 1 + high))


def require_on_policy(log_ratio: Tensor, tolerance: float, key: str) -> None:
    """Raise TrainingError unless |log ratio| [B] is within the tolerance, which the objective's `key` sets.

    Call it before the first update, where policy and rollout are the same. If they differ there, clipping acts on
    numerical differences, and not on changes of the policy. It makes the host wait, so do it if `ctx.first_batch`.
    """
    worst = float(log_ratio.detach().abs().max())
    if not worst <= tolerance:
        raise TrainingError(
            f"before the first update the log ratio of policy and rollout is {worst:.3g}, not 0: the model gives "
            "other velocities in training than in the rollout (dropout, precision, a sampler without density "
            f"at a trained step); fix that, or raise objective.{key} if you must"
        )


def share_rows(
    informative: Tensor, ctx: Context, group: int, *, epochs: int = 1, updates: int = 1
) -> Iterator[list[int]]:
    """Yield the indices of the rows that each of `epochs * updates` optimizer steps trains on; call it on all ranks.

    Each pass distributes the rows of every group over its updates, in a random order that does not depend on the number
    of ranks. Rows that are not informative are left out, except those that a rank needs to have as many rows as the
    others.

    informative  [B] bool; the rows are those of `ctx.rng`, and their groups are complete
    """
    import torch

    count, live = torch.arange(len(informative)) % group, informative.tolist()
    deals = ctx.rng.of("deal")
    for _ in range(epochs):
        if updates > 1:
            draws = deals.rand(len(live)).reshape(-1, group)
            count = draws.argsort(1).argsort(1).reshape(-1)
        share = count * updates // group
        for update in range(updates):
            index: list[int] = (share == update).nonzero().flatten().tolist()
            chosen = [i for i in index if live[i]]
            most = int(ctx.gather(torch.tensor([len(chosen)])).max())
            spare = [i for i in index if not live[i]]
            yield sorted(chosen + spare[: max(most, 1) - len(chosen)])


P = TypeVar("P", bound="TensorPart")


class TensorPart:
    """Base of parts that are attrs classes with `metrics`; tensors and conditions [B, ...] are sliced with the rows."""

    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self: P, rows: slice) -> P:
        return self.take(range(len(self))[rows])

    def take(self: P, index: Sequence[int]) -> P:
        """Return the rows in `index`, without the metrics, which describe the experience as a whole."""
        import torch

        kind: Any = type(self)
        values = {field.name: getattr(self, field.name) for field in fields(kind)}
        taken = {n: v[list(index)] for n, v in values.items() if isinstance(v, torch.Tensor | Condition)}
        return evolve(self, **taken, rows=[self.rows[i] for i in index], metrics={})
