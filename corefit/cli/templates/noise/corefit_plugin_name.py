"""plugin_name, a noise weighting for corefit: levels from the Kumaraswamy distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen, validators

from corefit import NoiseWeighting, Offers, hookimpl
from corefit.flow import shifted

if TYPE_CHECKING:
    from torch import Tensor

    from corefit.rng import Rng

COREFIT_API = "1.0"
SMALLEST = 2**-25
"""Uniform draws are raised to this number, because 0 is no noise level."""


@frozen
class PluginName(NoiseWeighting):
    """t = (1 - (1 - u)^(1 / b))^(1 / a), u uniform: close to Beta(a, b). All levels have the weight 1."""

    a: float = field(default=2.0, validator=validators.gt(0))
    """Above 1, the cleanest levels are drawn less often; below 1, more often."""
    b: float = field(default=2.0, validator=validators.gt(0))
    """Above 1, the noisiest levels are drawn less often; below 1, more often."""

    def sample(self, n: int, shift: float, rng: Rng) -> Tensor:
        uniform = rng.rand(n).clamp(min=SMALLEST)  # keyed by row; draw from nothing else
        return shifted(self.time(uniform).clamp(min=SMALLEST), shift)

    def time(self, uniform: Tensor) -> Tensor:
        """Map uniform draws in (0, 1) to t."""
        return (-((-uniform).log1p() / self.b).expm1()) ** (1 / self.a)

    def weight(self, sigma: Tensor) -> Tensor:
        return 1 + 0 * sigma


@hookimpl
def corefit_noise_weightings() -> Offers[NoiseWeighting]:
    return {"plugin_name": PluginName}
