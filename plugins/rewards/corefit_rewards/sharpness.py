"""Reward `sharpness`: the variance of the Laplacian (Pech-Pacheco et al., ICPR 2000)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from attrs import frozen

from corefit.types import Meta
from corefit_rewards.frames import FrameReward

if TYPE_CHECKING:
    from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
"""How much red, green and blue count in gray (ITU-R BT.601)."""


@frozen(slots=False)
class Sharpness(FrameReward):
    """Scores the variance of the Laplacian of the gray picture, in levels from 0 to 255.

    It is the usual measure of focus, `cv2.Laplacian(gray, cv2.CV_64F).var()`. Noise raises it as well as detail does.
    """

    differentiable: ClassVar[bool] = True

    def score_pictures(self, pictures: Tensor, prompts: Sequence[str], meta: Sequence[Meta]) -> Tensor:
        """Return variances [B], with a graph where the pictures have one."""
        from torch.nn.functional import pad

        weights = pictures.new_tensor(LUMA).float().reshape(3, 1, 1)
        gray = 255 * (pictures.float() * weights).sum(1, keepdim=True)
        wide = pad(gray, (1, 1, 1, 1), mode="reflect")
        beside = wide[..., 1:-1, :-2] + wide[..., 1:-1, 2:] + wide[..., :-2, 1:-1] + wide[..., 2:, 1:-1]
        return (beside - 4 * gray).flatten(1).var(1, correction=0)
