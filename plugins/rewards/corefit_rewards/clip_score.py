"""The reward clip_score: the cosine of a picture and its prompt in CLIP (arXiv 2103.00020, 2104.08718)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import frozen

from corefit.types import ModelPath
from corefit_rewards.clip import ClipReward, blank_clip
from corefit_rewards.network import Loaded

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PUBLISHED = ModelPath("openai/clip-vit-large-patch14")


@frozen(slots=False, kw_only=True)
class ClipScore(ClipReward):
    """How well a picture fits its prompt: the cosine of both in CLIP, mostly between 0.2 and 0.4.

    CLIPScore (arXiv 2104.08718) is 2.5 times that, torchmetrics' is 100 times that, and Flow-GRPO's 100 / 30 times.
    """

    path: ModelPath = PUBLISHED
    """A CLIP model as transformers saves it: a folder, relative to the pipeline file, or a name on the hub."""

    def check(self) -> None:
        self.check_clip(self.path, self.path)

    def load(self, place: torch.device) -> Loaded:
        return self.load_clip(self.path, self.path, place)

    def blank(self) -> Any:
        return blank_clip(self.path)

    def score_cosine(self, network: Any, cosine: Tensor) -> Tensor:
        return cosine
