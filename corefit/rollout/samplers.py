"""Samplers: each takes one step, from x at sigma to x at sigma_next < sigma, as a Gaussian transition.

All arithmetic is elementwise on [B, ...] with sigma, sigma_next [B], so one class serves images, video and
packed tokens. float64 inputs are kept; all others are converted to float32.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from attrs import field, frozen, validators

from corefit.flow import denoised, expand_like, log_prob, per_sample, predicted_noise, upcast
from corefit.types import Sampler, Step

if TYPE_CHECKING:
    from torch import Tensor

NEAR_ONE = 1 - 1e-4
"""Above this sigma, 1 / (1 - sigma) is too large to compute with; some grids start at 0.999999."""


@frozen
class Ode(Sampler):
    """Euler step of the probability-flow ODE, x + (sigma_next - sigma) v, as in FlowMatchEulerDiscreteScheduler."""

    @property
    def stochastic(self) -> bool:
        return False

    def step(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Step:
        return Step(upcast(x) + expand_like(sigma_next - sigma, x) * upcast(v), 0 * sigma)


@frozen
class FlowSde(Sampler):
    """Flow-SDE of Flow-GRPO (arXiv 2505.05470, eq. 9): sd = noise sqrt(sigma / (1 - sigma)), std = sd sqrt(-dt).

    At sigma = 1, where 1 / (1 - sigma) is infinite, sigma_next stands for sigma in it, as in the published code.
    """

    noise: float = field(default=0.7, validator=validators.ge(0))
    """The noise level a of the paper; with 0 it is the ODE."""

    @property
    def stochastic(self) -> bool:
        return self.noise > 0

    def step(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Step:
        finite = sigma_next.where(sigma > NEAR_ONE, sigma)
        sd = self.noise * (sigma / (1 - finite)).sqrt()
        return _langevin(upcast(x), upcast(v), sigma, sigma_next, sd)


@frozen
class DanceSde(Sampler):
    """The SDE of DanceGRPO (arXiv 2505.07818), which is Flow-SDE with a constant sd = noise."""

    noise: float = field(default=0.3, validator=validators.ge(0))
    """The noise level, equal at every sigma; with 0 it is the ODE."""

    @property
    def stochastic(self) -> bool:
        return self.noise > 0

    def step(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Step:
        return _langevin(upcast(x), upcast(v), sigma, sigma_next, self.noise + 0 * sigma)


@frozen
class Cps(Sampler):
    """Coefficient-preserving sampling (FlowCPS, arXiv 2509.05952): x_next has signal 1 - sigma_next, noise sigma_next.

    std = sigma_next sin(noise pi / 2). The last step, to sigma 0, is deterministic.
    """

    noise: float = field(default=0.7, validator=[validators.ge(0), validators.le(1)])
    """How much of the noise is drawn anew in each step; 0 is the ODE, 1 draws all of it anew."""
    density: Literal["gaussian", "published"] = "gaussian"
    """The log-probability: the Gaussian one, or the published -|x_next - mean|^2, which has another scale."""

    @property
    def stochastic(self) -> bool:
        return self.noise > 0

    def step(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Step:
        x, v = upcast(x), upcast(v)
        std = sigma_next * math.sin(self.noise * math.pi / 2)
        kept = (sigma_next**2 - std**2).sqrt()
        signal = expand_like(1 - sigma_next, x) * denoised(x, v, sigma)
        return Step(signal + expand_like(kept, x) * predicted_noise(x, v, sigma), std)

    def log_prob(self, x_next: Tensor, step: Step) -> Tensor:
        if self.density == "gaussian":
            return log_prob(x_next, step.mean, step.std)
        return -per_sample((upcast(x_next) - step.mean) ** 2)


def _langevin(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, sd: Tensor) -> Step:
    """Take an Euler-Maruyama step of the SDE that has diffusion sd [B] and the same marginals as the ODE.

    mean = x (1 + sd^2 dt / (2 sigma)) + v (1 + sd^2 (1 - sigma) / (2 sigma)) dt.
    """
    dt = sigma_next - sigma
    pull = sd**2 / (2 * sigma)
    mean = x * expand_like(1 + pull * dt, x) + v * expand_like((1 + pull * (1 - sigma)) * dt, v)
    return Step(mean, sd * (-dt).sqrt())
