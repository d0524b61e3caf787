"""The tables of 1000 noise levels in the published code, in the same float32 arithmetic, for `levels = "table"`.

HY-SOAR computes with times t (1 is noise) and looks up sigma in the training table of diffusers'
FlowMatchEulerDiscreteScheduler: sigma_i = shift x / (1 + (shift - 1) x) with x = (1000 - i) / 1000. The look-ups round
down, and in float32 the conversion index -> t -> index gives the neighboring index for 165 of the 1000 entries. The
model is then given a timestep up to 3 away from that of its state. This exists only to reproduce published runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from corefit.flow import shifted

if TYPE_CHECKING:
    from torch import Tensor

ENTRIES = 1000


def table(shift: float, like: Tensor) -> Tensor:
    """The training table [1000], decreasing from 1; float32, on the device of `like`."""
    import torch

    timesteps = torch.linspace(ENTRIES, 1, ENTRIES, dtype=torch.float32, device=like.device)
    return shifted(timesteps / ENTRIES, shift)


def sigma_at(t: Tensor, shift: float) -> Tensor:
    """The table's sigma for time t [B]: entry trunc((1 - t) 1000)."""
    return table(shift, t)[((1 - t) * ENTRIES).long().clamp(0, ENTRIES - 1)]


def time_of(sigma: Tensor, shift: float) -> Tensor:
    """Time 1 - i/1000 of the first entry i that is at most sigma [B]."""
    import torch

    entries = table(shift, sigma)
    index = torch.searchsorted(-entries, -sigma.contiguous()).clamp(0, ENTRIES - 1)
    return 1 - index.to(torch.float32) / ENTRIES


def model_sigma(sigma: Tensor, shift: float) -> Tensor:
    """The sigma [B] that the model is given for a state at sigma [B]."""
    return sigma_at(time_of(sigma, shift), shift)
