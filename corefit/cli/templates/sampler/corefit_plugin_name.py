"""plugin_name, a sampler for corefit: ancestral Euler steps, which overshoot and put noise back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen, validators

from corefit import Offers, Sampler, Step, hookimpl
from corefit.flow import denoised, expand_like, interpolate, predicted_noise, upcast

if TYPE_CHECKING:
    from torch import Tensor

COREFIT_API = "1.0"


@frozen
class PluginName(Sampler):
    """Euler down to a level below sigma_next, then noise that brings the state up to sigma_next.

    Signal 1 - sigma_next and noise sigma_next are exact if the velocity is. The last step, to 0, adds no noise.
    """

    eta: float = field(default=0.5, validator=[validators.ge(0), validators.le(1)])
    """How far a step overshoots, and therefore how much new noise it adds; 0 is the ODE."""

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def step(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Step:
        x, v = upcast(x), upcast(v)  # at least float32, whatever the network's dtype
        down = sigma_next * (1 + self.eta * (sigma_next / sigma - 1))  # [B], from 0 to sigma_next
        state = interpolate(denoised(x, v, sigma), predicted_noise(x, v, sigma), down)
        shrink = (1 - sigma_next) / (1 - down)  # what the signal loses on its way back up
        variance = sigma_next**2 - (shrink * down) ** 2
        return Step(expand_like(shrink, x) * state, variance.clamp(min=0).sqrt())


@hookimpl
def corefit_samplers() -> Offers[Sampler]:
    return {"plugin_name": PluginName}
