"""Rectified-flow arithmetic, elementwise on tensors [B, ...] with any number of axes.

sigma [B] is in [0, 1], where 1 is pure noise; x = (1 - sigma) x0 + sigma noise; v = noise - x0 = dx/dsigma.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Level = TypeVar("Level", float, "Tensor")


def expand_like(s: Tensor, x: Tensor) -> Tensor:
    """Reshape s [B] so that it broadcasts over x [B, ...]."""
    return s.reshape(s.shape + (1,) * (x.ndim - s.ndim))


def upcast(x: Tensor) -> Tensor:
    """Convert x to float32, the precision of all arithmetic on latents; float64 stays as it is."""
    return x if x.dtype.itemsize == 8 else x.float()


def interpolate(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return the state at sigma [B] on the straight line from x0 to noise: (1 - sigma) x0 + sigma noise."""
    s = expand_like(sigma, x0)
    return (1 - s) * x0 + s * noise


def per_sample(e: Tensor) -> Tensor:
    """Return the mean [B] over all but the first axis."""
    return e.flatten(1).mean(1)


def denoised(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """Return the clean sample that the velocity v at (x, sigma [B]) implies: x - sigma v."""
    return x - expand_like(sigma, x) * v


def predicted_noise(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """Return the noise that the velocity v at (x, sigma [B]) implies: x + (1 - sigma) v."""
    return x + (1 - expand_like(sigma, x)) * v


def shifted(t: Level, shift: float) -> Level:
    """Shift a time t to sigma = shift t / (1 + (shift - 1) t); SD3 (arXiv 2403.03206), eq. 23."""
    return shift * t / (1 + (shift - 1) * t)


def unshifted(sigma: Level, shift: float) -> Level:
    """Invert `shifted`: return the time t that is shifted to sigma."""
    return sigma / (shift - (shift - 1) * sigma)


def log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the Gaussian log-density [B] of x [B, ...] as a mean (not a sum) over all but the first axis.

    std [B] is the whole standard deviation of the step. The scale of published clip ranges depends on taking the mean
    (flow_grpo, sd3_sde_with_logprob).
    """
    error = per_sample((upcast(x) - mean) ** 2)
    return -error / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)


like, raised, mix, clean, noise_end = expand_like, upcast, interpolate, denoised, predicted_noise
"""`expand_like` and the others, under the names that they had in version 0.1."""
