"""The published code's 1000-entry tables, in its own float32 arithmetic, for `levels = "table"`.

HY-SOAR keeps times t (1 is noise) and looks sigma up in the training table of diffusers'
FlowMatchEulerDiscreteScheduler: sigma_i = shift x / (1 + (shift - 1) x), x = (1000 - i) / 1000. The look-ups
floor, and float32 rounding sends index -> t -> index to its neighbour for 165 of the 1000 entries; the model is
then told a timestep up to 3 off its state's. Kept to reproduce published runs, not for its merits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from corefit.flow import shifted

if TYPE_CHECKING:
    from torch import Tensor

ENTRIES = 1000


def table(shift: float, like: Tensor) -> Tensor:
    """The training table [1000], falling from 1; float32, on the device of `like`."""
    import torch

    timesteps = torch.linspace(ENTRIES, 1, ENTRIES, dtype=torch.float32, device=like.device)
    return shifted(timesteps / ENTRIES, shift)


def sigma_at(t: Tensor, shift: float) -> Tensor:
    """Table sigma of time t [B]: entry trunc((1 - t) 1000)."""
    return table(shift, t)[((1 - t) * ENTRIES).long().clamp(0, ENTRIES - 1)]


def time_of(sigma: Tensor, shift: float) -> Tensor:
    """Time 1 - i/1000 of the first entry that is not above sigma [B]."""
    import torch

    entries = table(shift, sigma)
    index = torch.searchsorted(-entries, -sigma.contiguous()).clamp(0, ENTRIES - 1)
    return 1 - index.to(torch.float32) / ENTRIES


def told(sigma: Tensor, shift: float) -> Tensor:
    """The table sigma that the model is told for a state at sigma [B]."""
    return sigma_at(time_of(sigma, shift), shift)
