"""The clipped policy gradient and the divergence from the reference, for each sample: [B]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from corefit.flow import per_sample

if TYPE_CHECKING:
    from torch import Tensor


def policy_loss(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """max(-A ratio, -A clamp(ratio, 1 - low, 1 + high)), [B]: PPO's loss, Flow-GRPO eq. 5."""
    return (-advantage * ratio).maximum(-advantage * ratio.clamp(1 - low, 1 + high))


def divergence(mean: Tensor, reference: Tensor, std: Tensor, dt: Tensor, form: Literal["exact", "published"]) -> Tensor:
    """KL of two Gaussian transitions with means [B, ...] and the same std, as a mean over dimensions, [B].

    exact      |mean - reference|^2 / (2 std^2), the KL of the Gaussians
    published  |dt| times that: the published SD3 script divides by sd^2, where std = sd sqrt(|dt|)
    """
    kl = per_sample((mean - reference) ** 2) / (2 * std**2)
    return kl if form == "exact" else kl * dt.abs()
