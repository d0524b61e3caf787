"""Rectified-flow arithmetic on [B, ...] of any rank: elementwise, and torch is not imported to read it.

sigma [B] is in [0, 1], 1 pure noise; x = (1 - sigma) x0 + sigma noise; v = noise - x0 = dx/dsigma.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Level = TypeVar("Level", float, "Tensor")


def expand_like(s: Tensor, x: Tensor) -> Tensor:
    """s [B] shaped to broadcast over x [B, ...]."""
    return s.reshape(s.shape + (1,) * (x.ndim - s.ndim))


def upcast(x: Tensor) -> Tensor:
    """x as it is in float64, in float32 otherwise: the precision of all arithmetic on latents."""
    return x if x.dtype.itemsize == 8 else x.float()


def interpolate(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The state at sigma [B] on the straight line: (1 - sigma) x0 + sigma noise."""
    s = expand_like(sigma, x0)
    return (1 - s) * x0 + s * noise


def per_sample(e: Tensor) -> Tensor:
    """[B]: mean over all but the first axis."""
    return e.flatten(1).mean(1)


def denoised(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """The clean sample that velocity v implies at (x, sigma [B]): x - sigma v."""
    return x - expand_like(sigma, x) * v


def predicted_noise(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """The noise that velocity v implies at (x, sigma [B]): x + (1 - sigma) v."""
    return x + (1 - expand_like(sigma, x)) * v


def shifted(t: Level, shift: float) -> Level:
    """Unshifted time t -> sigma = shift t / (1 + (shift - 1) t); SD3 (arXiv 2403.03206), eq. 23."""
    return shift * t / (1 + (shift - 1) * t)


def unshifted(sigma: Level, shift: float) -> Level:
    """The inverse of `shifted`."""
    return sigma / (shift - (shift - 1) * sigma)


def log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Gaussian log-density [B] of x [B, ...], mean (not sum) over all but the first axis.

    std [B] is the whole standard deviation. The scale of published clip ranges depends on this convention
    (flow_grpo, sd3_sde_with_logprob).
    """
    error = per_sample((upcast(x) - mean) ** 2)
    return -error / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)


like, raised, mix, clean, noise_end = expand_like, upcast, interpolate, denoised, predicted_noise
"""The names that these had in version 0.1."""
