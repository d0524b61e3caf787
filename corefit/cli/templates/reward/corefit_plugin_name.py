"""plugin_name, a reward for corefit: how colorful a picture is (Hasler and Suesstrunk, 2003)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import field, frozen, validators

from corefit import Offers, Reward, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

COREFIT_API = "1.0"


@frozen
class PluginName(Reward):
    """Spread of the opponent colors, plus `mean` times their distance from gray: 0 for gray, about 0.5 for vivid."""

    mean: float = field(default=0.3, validator=validators.ge(0))
    """Weight of the mean color; the paper has 0.3."""

    def score(self, media: Tensor, prompts: Sequence[str], meta: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return scores [B] of pictures [B, 3, H, W] or clips [B, 3, T, H, W] in [0, 1], each row by itself."""
        red, green, blue = media.float().flatten(2).unbind(1)  # [B, pixels] each
        first, second = red - green, (red + green) / 2 - blue
        spread = (first.var(1, correction=0) + second.var(1, correction=0)).sqrt()
        distance = (first.mean(1) ** 2 + second.mean(1) ** 2).sqrt()
        return spread + self.mean * distance


@hookimpl
def corefit_rewards() -> Offers[Reward]:
    return {"plugin_name": PluginName}
