"""The reward pickscore: PickScore, a CLIP that was trained on choices of people (arXiv 2305.01569)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import field, frozen, validators

from corefit.types import ModelPath
from corefit_rewards import files
from corefit_rewards.clip import ClipReward, blank_clip
from corefit_rewards.network import Loaded

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PUBLISHED = ModelPath("yuvalkirstain/PickScore_v1")
BESIDE = ModelPath("laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
"""Where the authors' code takes tokenizer and preprocessing from."""


@frozen(slots=False, kw_only=True)
class PickScore(ClipReward):
    """How people would like a picture for its prompt: the cosine of both in PickScore, times its logit scale (100)."""

    path: ModelPath = PUBLISHED
    """PickScore as transformers saves it: a folder, relative to the pipeline file, or a name on the hub."""
    processor: ModelPath | None = None
    """A folder or name of tokenizer and preprocessing. By default it is `path` if that is a folder with a tokenizer,
    and else laion/CLIP-ViT-H-14-laion2B-s32B-b79K, as published."""
    divisor: float = field(default=26.0, validator=validators.gt(0))
    """What the score is divided by. 26 makes it about 0.7 to 0.9, as Flow-GRPO does; 1 leaves it as published, about 18
    to 24."""

    def check(self) -> None:
        self.check_clip(self.path, self._beside)

    def load(self, place: torch.device) -> Loaded:
        return self.load_clip(self.path, self._beside, place)

    def blank(self) -> Any:
        return blank_clip(self.path)

    def score_cosine(self, network: Any, cosine: Tensor) -> Tensor:
        return network.logit_scale.exp() * cosine / self.divisor

    @property
    def _beside(self) -> str:
        """The folder or name of tokenizer and preprocessing."""
        if self.processor is not None:
            return self.processor
        here = files.local(self.path)
        return self.path if here is not None and (here / "tokenizer_config.json").is_file() else BESIDE
