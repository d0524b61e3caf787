"""How one step is taken: x at sigma -> x at sigma_next < sigma, as a Gaussian transition.

All arithmetic is elementwise on [B, ...] with sigma, sigma_next [B], so one class serves images, video and
packed tokens. Input dtype is kept for float64 and raised to float32 otherwise.
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
"""Above this sigma, 1 / (1 - sigma) is no longer a number to work with (grids may start at 0.999999)."""


@frozen
class Ode(Sampler):
    """Euler step of the probability-flow ODE, x + (sigma_next - sigma) v: FlowMatchEulerDiscreteScheduler's."""

    @property
    def stochastic(self) -> bool:
        return False

    def step(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Step:
        return Step(upcast(x) + expand_like(sigma_next - sigma, x) * upcast(v), 0 * sigma)


@frozen
class FlowSde(Sampler):
    """Flow-SDE of Flow-GRPO (arXiv 2505.05470, eq. 9): sd = noise sqrt(sigma / (1 - sigma)), std = sd sqrt(-dt).

    At sigma = 1, 1 / (1 - sigma) takes sigma_next for sigma: the grid's second value, as published.
    """

    noise: float = field(default=0.7, validator=validators.ge(0))
    """Noise level a; 0 is the ODE."""

    @property
    def stochastic(self) -> bool:
        return self.noise > 0

    def step(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Step:
        finite = sigma_next.where(sigma > NEAR_ONE, sigma)
        sd = self.noise * (sigma / (1 - finite)).sqrt()
        return _langevin(upcast(x), upcast(v), sigma, sigma_next, sd)


@frozen
class DanceSde(Sampler):
    """The SDE of DanceGRPO (arXiv 2505.07818): the drift of Flow-SDE with a constant sd = noise."""

    noise: float = field(default=0.3, validator=validators.ge(0))
    """Noise level, the same at every sigma; 0 is the ODE."""

    @property
    def stochastic(self) -> bool:
        return self.noise > 0

    def step(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Step:
        return _langevin(upcast(x), upcast(v), sigma, sigma_next, self.noise + 0 * sigma)


@frozen
class Cps(Sampler):
    """Coefficient-preserving sampling (FlowCPS, arXiv 2509.05952): signal 1 - sigma_next, total noise sigma_next.

    std = sigma_next sin(noise pi / 2); the last step, to sigma 0, is deterministic.
    """

    noise: float = field(default=0.7, validator=[validators.ge(0), validators.le(1)])
    """Share of the noise that is drawn anew: 0 is the ODE, 1 redraws all of it."""
    density: Literal["gaussian", "published"] = "gaussian"
    """log_prob: the Gaussian's, or the published -|x_next - mean|^2, whose scale is another one."""

    @property
    def stochastic(self) -> bool:
        return self.noise > 0

    def step(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Step:
        x, v = upcast(x), upcast(v)
        std = sigma_next * math.sin(self.noise * math.pi / 2)
        kept = (sigma_next**2 - std**2).sqrt()
        mean = expand_like(1 - sigma_next, x) * denoised(x, v, sigma) + expand_like(kept, x) * predicted_noise(
            x, v, sigma
        )
        return Step(mean, std)

    def log_prob(self, x_next: Tensor, step: Step) -> Tensor:
        if self.density == "gaussian":
            return log_prob(x_next, step.mean, step.std)
        return -per_sample((upcast(x_next) - step.mean) ** 2)


def _langevin(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, sd: Tensor) -> Step:
    """Euler-Maruyama of the SDE with the ODE's marginals and diffusion sd [B].

    mean = x (1 + sd^2 dt / (2 sigma)) + v (1 + sd^2 (1 - sigma) / (2 sigma)) dt.
    """
    dt = sigma_next - sigma
    pull = sd**2 / (2 * sigma)
    mean = x * expand_like(1 + pull * dt, x) + v * expand_like((1 + pull * (1 - sigma)) * dt, v)
    return Step(mean, sd * (-dt).sqrt())
