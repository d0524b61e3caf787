"""Scores of clips: their frames are scored like pictures, and the scores of the frames are pooled."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from attrs import field, frozen, validators

from corefit.types import Meta, Reward

if TYPE_CHECKING:
    from torch import Tensor


@frozen(slots=False)
class FrameReward(Reward):
    """Base of rewards that score pictures, and clips by their frames. A subclass writes `score_pictures`."""

    pool: Literal["mean", "min", "max", "first"] = "mean"
    """How the scores of a clip's frames become one: their mean, the lowest, the highest, or that of the first frame
    alone."""
    frames: int = field(default=8, validator=[validators.ge(1), validators.le(1000)])
    """How many frames of a clip are scored, spread evenly from the first to the last. Pictures have one."""

    @abstractmethod
    def score_pictures(self, pictures: Tensor, prompts: Sequence[str], meta: Sequence[Meta]) -> Tensor:
        """Return scores [B] for pictures [B, 3, H, W] in [0, 1]; raise an exception where scoring fails."""

    def score(self, media: Tensor, prompts: Sequence[str], meta: Sequence[Meta]) -> Tensor:
        """Return scores [B] for pictures [B, 3, H, W] or clips [B, 3, T, H, W] in [0, 1]."""
        if media.ndim == 4:
            return self.score_pictures(media, prompts, meta)
        chosen = self.chosen(media)
        count = chosen.shape[2]
        pictures = chosen.transpose(1, 2).flatten(0, 1)
        repeated = [(prompt, one) for prompt, one in zip(prompts, meta, strict=True) for _ in range(count)]
        scores = self.score_pictures(pictures, [prompt for prompt, _ in repeated], [one for _, one in repeated])
        return self.pooled(scores.reshape(len(media), count))

    def chosen(self, clips: Tensor) -> Tensor:
        """Return the frames [B, 3, n, H, W] of clips [B, 3, T, H, W] that are scored."""
        import torch

        numbers = self._numbers(clips.shape[2])
        return torch.stack([clips[:, :, number] for number in numbers], 2)

    def pooled(self, scores: Tensor) -> Tensor:
        """Return the scores [B] of clips whose frames have the scores [B, n]."""
        return {"min": scores.amin, "max": scores.amax}.get(self.pool, scores.mean)(1)

    def _numbers(self, length: int) -> list[int]:
        """Return the numbers of the frames that are scored."""
        count = 1 if self.pool == "first" else min(self.frames, length)
        return [round(i * (length - 1) / max(1, count - 1)) for i in range(count)]
