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
"""A uniform draw may be 0, which is no noise level."""


@frozen
class PluginName(NoiseWeighting):
    """t = (1 - (1 - u)^(1 / b))^(1 / a), u uniform: close to Beta(a, b). All levels count alike."""

    a: float = field(default=2.0, validator=validators.gt(0))
    """Above 1, the cleanest levels are left out more; below 1, they are favoured."""
    b: float = field(default=2.0, validator=validators.gt(0))
    """Above 1, the noisiest levels are left out more; below 1, they are favoured."""

    def sample(self, n: int, shift: float, rng: Rng) -> Tensor:
        uniform = rng.rand(n).clamp(min=SMALLEST)  # keyed by row: nothing else may be drawn from
        return shifted(self.time(uniform).clamp(min=SMALLEST), shift)

    def time(self, uniform: Tensor) -> Tensor:
        """Uniform draws in (0, 1) -> t."""
        return (-((-uniform).log1p() / self.b).expm1()) ** (1 / self.a)

    def weight(self, sigma: Tensor) -> Tensor:
        return 1 + 0 * sigma


@hookimpl
def corefit_noise_weightings() -> Offers[NoiseWeighting]:
    return {"plugin_name": PluginName}
