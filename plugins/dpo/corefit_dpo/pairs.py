"""The pairs that are trained on, and how the samples of a group become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from attrs import frozen

from corefit import Batch, Condition
from corefit.rollout import TensorPart, advantages

if TYPE_CHECKING:
    from torch import Tensor


@frozen(eq=False)
class Pairs(TensorPart):
    """B pairs of clean latents with the same prompt.

    winner, loser  the preferred latents and the other ones, [B, ...]
    counted        [B] bool, whether the pair has a preference; other pairs have no gradient and are not counted
    rows           the number of each pair, by which its noise is drawn
    """

    winner: Tensor
    loser: Tensor
    counted: Tensor
    cond: Condition
    rows: Sequence[int]
    metrics: Mapping[str, Tensor] = {}


def best_and_worst(x0: Tensor, reward: Tensor, batch: Batch, group: int) -> Pairs:
    """Pair the samples x0 [B, ...] that have the highest and the lowest reward [B] of each group.

    A group whose rewards are all equal, up to rounding, has no preference. Its pair is not counted.
    """
    grouped = reward.reshape(-1, group)
    first = range(0, len(batch), group)
    best, worst = (
        [start + i for start, i in zip(first, each.tolist(), strict=True)]
        for each in (grouped.argmax(1), grouped.argmin(1))
    )
    rows = [batch.rows[start] for start in first]
    counted = preferred(reward, group).to(x0.device, non_blocking=True)
    return Pairs(x0[best], x0[worst], counted, batch.cond[best], rows)


def preferred(reward: Tensor, group: int) -> Tensor:
    """Return for each group whether its rewards [B] prefer a sample, [B / group] bool, where the rewards are."""
    return (advantages(reward, group, global_std=False).reshape(-1, group) != 0).any(1)
