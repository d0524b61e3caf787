"""Reward `jpeg_size`: the size of a picture as a JPEG file (DDPO, arXiv 2305.13301)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from attrs import field, frozen, validators

from corefit.types import Meta
from corefit_rewards.frames import FrameReward
from corefit_rewards.pixels import encoded, pixels, scored

if TYPE_CHECKING:
    from torch import Tensor


@frozen(slots=False)
class JpegSize(FrameReward):
    """Scores the size of a picture's JPEG file in kilobytes of 1000 bytes, with the sign of what is wanted."""

    concurrent: ClassVar[bool] = True

    wanted: Literal["small", "large"] = "small"
    """"small" scores minus the size, DDPO's compressibility; "large" scores the size, its incompressibility."""
    quality: int = field(default=95, validator=[validators.ge(1), validators.le(100)])
    """The quality setting of the JPEG file; 95 is that of DDPO and Flow-GRPO."""

    def score_pictures(self, pictures: Tensor, prompts: Sequence[str], meta: Sequence[Meta]) -> Tensor:
        """Return sizes [B] in kilobytes, negative where small files are wanted."""
        return scored(pictures, lambda rows: [self._score(picture) for picture in pixels(pictures[rows])])

    def _score(self, picture: Any) -> float:
        return len(encoded(picture, "jpeg", self.quality)) / (1000 if self.wanted == "large" else -1000)
