"""Group-relative advantages: how much better a sample is than the other samples of its prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 1e-4
"""Added to the standard deviation, as in the published code (flow_grpo, PerPromptStatTracker)."""


def advantages(rewards: Tensor, group: int, *, global_std: bool) -> Tensor:
    """(reward - mean of its group) / (std + 1e-4), [B].

    std is the population standard deviation, over all rewards (the default of the published code) or over the group
    (eq. 4 of the paper). In a group whose rewards are equal, up to rounding, all advantages are exactly 0.

    rewards  [B]; groups are complete, and their rows consecutive
    """
    rows = rewards.reshape(-1, group)
    centered = rows - rows.mean(1, keepdim=True)
    spread = rows.std(1, correction=0, keepdim=True)
    std = rewards.std(correction=0) if global_std else spread
    constant = spread <= 1e-6 * rows.abs().amax(1, keepdim=True).clamp(min=1e-6)
    return (centered / (std + EPSILON)).masked_fill(constant, 0).reshape(-1)
