"""Group-relative advantages: how much better a sample is than the others of its prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 1e-4
"""Added to the standard deviation, as published (flow_grpo, PerPromptStatTracker)."""


def advantages(rewards: Tensor, group: int, *, global_std: bool) -> Tensor:
    """(r - mean of its group) / (std + 1e-4), [B], for rewards [B] whose groups are consecutive and whole.

    std is the population's: of all rewards (the published default) or of the group (the paper's eq. 4). Groups
    without variance, up to rounding, are exactly 0.
    """
    rows = rewards.reshape(-1, group)
    centred = rows - rows.mean(1, keepdim=True)
    spread = rows.std(1, correction=0, keepdim=True)
    std = rewards.std(correction=0) if global_std else spread
    constant = spread <= 1e-6 * rows.abs().amax(1, keepdim=True).clamp(min=1e-6)
    return (centred / (std + EPSILON)).masked_fill(constant, 0).reshape(-1)
