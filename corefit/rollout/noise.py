"""At which noise levels a model is supervised, and how much each counts (SD3, arXiv 2403.03206, section 3.1).

A draw is a time t in [0, 1], 1 pure noise, shifted to sigma = shift t / (1 + (shift - 1) t). diffusers' training
scripts run t the other way: a logit-normal mean of theirs is minus the mean here.
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
"""Below every uniform draw but 0, which would be no noise level."""


@frozen
class LogitNormal(NoiseWeighting):
    """t = sigmoid(mean + std n): the density is the whole weighting. SD3's choice, and the default."""

    mean: float = 0.0
    """Above 0 favours noise, below 0 data."""
    std: float = field(default=1.0, validator=validators.gt(0))
    """Spread before the sigmoid: more is nearer to both ends."""

    def sample(self, n: int, shift: float, rng: Rng) -> Tensor:
        return shifted(self.time(rng.randn((n,))), shift)

    def time(self, normal: Tensor) -> Tensor:
        """Standard normal draws -> t."""
        return (self.mean + self.std * normal).sigmoid()

    def weight(self, sigma: Tensor) -> Tensor:
        return 1 + 0 * sigma


@frozen
class Mode(NoiseWeighting):
    """t = 1 - r - scale (cos^2(pi r / 2) - 1 + r), r uniform: heavier in the middle, no level left out."""

    scale: float = field(default=1.29, validator=[validators.ge(-1), validators.le(2 / (math.pi - 2))])
    """How much heavier the middle is; 0 is uniform."""

    def sample(self, n: int, shift: float, rng: Rng) -> Tensor:
        return shifted(self.time(rng.rand(n)), shift)

    def time(self, uniform: Tensor) -> Tensor:
        """Uniform draws in [0, 1) -> t."""
        return 1 - uniform - self.scale * ((math.pi * uniform / 2).cos() ** 2 - 1 + uniform)

    def weight(self, sigma: Tensor) -> Tensor:
        return 1 + 0 * sigma


@frozen
class Uniform(NoiseWeighting):
    """t uniform, every level counts the same."""

    def sample(self, n: int, shift: float, rng: Rng) -> Tensor:
        return shifted(rng.rand(n).clamp(min=SMALLEST), shift)

    def weight(self, sigma: Tensor) -> Tensor:
        return 1 + 0 * sigma


@frozen
class CosMap(Uniform):
    """t uniform, weight 2 / (pi (1 - 2 sigma + 2 sigma^2))."""

    def weight(self, sigma: Tensor) -> Tensor:
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))


@frozen
class SigmaSqrt(Uniform):
    """t uniform, weight sigma^-2 (the published name notwithstanding): the loss of the clean estimate."""

    floor: float = field(default=0.002, validator=validators.gt(0))
    """Levels below count as this one: the weight stays at most floor^-2 (the published table ends at 0.003)."""

    def weight(self, sigma: Tensor) -> Tensor:
        return sigma.clamp(min=self.floor) ** -2
