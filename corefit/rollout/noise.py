"""Noise weightings: densities of the noise levels in training and loss weights (SD3, arXiv 2403.03206, section 3.1).

Each draws a time t in [0, 1], where 1 is pure noise, and shifts it to sigma = shift t / (1 + (shift - 1) t). In
diffusers' training scripts t runs the other way, so the mean of their logit-normal is minus the mean here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from attrs import field, frozen, validators

from corefit.flow import shifted
from corefit.types import NoiseWeighting

if TYPE_CHECKING:
    from torch import Tensor

    from corefit.rng import Rng

SMALLEST = 2**-25
"""A uniform draw of 0 is raised to this, because sigma must be above 0; every other float32 draw is larger."""


@frozen
class LogitNormal(NoiseWeighting):
    """t = sigmoid(mean + std n) with n normal; the loss weight is 1. SD3 chose it, and it is the default."""

    mean: float = 0.0
    """The mean before the sigmoid; above 0 favors noise, below 0 favors data."""
    std: float = field(default=1.0, validator=validators.gt(0))
    """The standard deviation before the sigmoid; a larger one draws more levels near 0 and 1."""

    def sample(self, n: int, shift: float, rng: Rng) -> Tensor:
        return shifted(self.time(rng.randn((n,))), shift)

    def time(self, normal: Tensor) -> Tensor:
        """Map standard normal draws to t."""
        return (self.mean + self.std * normal).sigmoid()

    def weight(self, sigma: Tensor) -> Tensor:
        return 1 + 0 * sigma


@frozen
class Mode(NoiseWeighting):
    """t = 1 - r - scale (cos^2(pi r / 2) - 1 + r) with r uniform; more draws in the middle, none excluded; weight 1."""

    scale: float = field(default=1.29, validator=[validators.ge(-1), validators.le(2 / (math.pi - 2))])
    """How strongly levels in the middle are preferred; 0 is uniform, below 0 prefers the ends."""

    def sample(self, n: int, shift: float, rng: Rng) -> Tensor:
        return shifted(self.time(rng.rand(n)), shift)

    def time(self, uniform: Tensor) -> Tensor:
        """Map uniform draws in [0, 1) to t."""
        return 1 - uniform - self.scale * ((math.pi * uniform / 2).cos() ** 2 - 1 + uniform)

    def weight(self, sigma: Tensor) -> Tensor:
        return 1 + 0 * sigma


class _UniformTime(NoiseWeighting):
    """Base of the weightings that draw t uniformly; a subclass writes `weight`."""

    def sample(self, n: int, shift: float, rng: Rng) -> Tensor:
        return shifted(rng.rand(n).clamp(min=SMALLEST), shift)


@frozen
class Uniform(_UniformTime):
    """t is uniform, and the loss weight is 1."""

    def weight(self, sigma: Tensor) -> Tensor:
        return 1 + 0 * sigma


@frozen
class CosMap(_UniformTime):
    """t is uniform, and the loss weight is 2 / (pi (1 - 2 sigma + 2 sigma^2))."""

    def weight(self, sigma: Tensor) -> Tensor:
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))


@frozen
class SigmaSqrt(_UniformTime):
    """t is uniform, and the loss weight is sigma^-2 (despite the name), which turns the loss into that of x0."""

    floor: float = field(default=0.002, validator=validators.gt(0))
    """Lower levels are weighted like this one: no weight exceeds floor^-2 (the published table ends at 0.003)."""

    def weight(self, sigma: Tensor) -> Tensor:
        return sigma.clamp(min=self.floor) ** -2
