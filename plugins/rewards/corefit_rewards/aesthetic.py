"""The reward aesthetic: LAION's aesthetic predictor, version 2, a head on CLIP's pictures.

Published in github.com/christophschuhmann/improved-aesthetic-predictor; DDPO (arXiv 2305.13301) trains with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import frozen

from corefit.errors import ModelError
from corefit.types import ModelPath
from corefit_rewards import files
from corefit_rewards.clip import CONFIG, PROCESSOR, check_config
from corefit_rewards.models import blank_head, linear_head, read, tried
from corefit_rewards.network import Loaded, NetworkReward
from corefit_rewards.pictures import Preprocess

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

PUBLISHED = ModelPath("openai/clip-vit-large-patch14")
HEAD = ModelPath("trl-lib/ddpo-aesthetic-predictor")
HEADS = (
    "aesthetic-model.safetensors",
    "aesthetic-model.pth",
    "sac+logos+ava1-l14-linearMSE.safetensors",
    "sac+logos+ava1-l14-linearMSE.pth",
)
"""Names under which the head's file is published."""


@frozen(slots=False, kw_only=True)
class Aesthetic(NetworkReward):
    """How people would rate the looks of a picture, from 1 to 10, mostly between 4 and 7; prompts are not read."""

    path: ModelPath = PUBLISHED
    """The CLIP ViT-L/14 that the head was trained on: a folder as transformers saves it, or a name on the hub."""
    head: ModelPath = HEAD
    """The head: a .safetensors or .pth file, a folder that has it, or a name on the hub."""

    def check(self) -> None:
        files.check_folder(self.path, [(CONFIG,), (PROCESSOR,), files.WEIGHTS])
        check_config(self.path)
        files.find(self.head, HEADS, "head", fetch=False)

    def load(self, place: torch.device) -> Loaded:
        from torch import nn
        from transformers import CLIPVisionModelWithProjection

        folder = files.weights_folder(self.path)
        config = files.settings(folder / PROCESSOR)
        file = files.find(self.head, HEADS, "head")
        assert file is not None, "what is on the hub is fetched"
        parts = {
            "clip": read(CLIPVisionModelWithProjection, _vision(folder), folder),
            "head": linear_head(files.tensors(file), file),
        }
        found, expected = parts["head"][0].in_features, parts["clip"].config.projection_dim
        if found != expected:
            raise ModelError(
                f"{file}: a head for features of length {found}, and those of this CLIP have {expected}; the published "
                f"head was trained on {PUBLISHED}"
            )
        return Loaded(nn.ModuleDict(parts), Preprocess.read(place, config, str(folder / PROCESSOR)))

    def blank(self) -> nn.Module:
        import torch
        from torch import nn
        from transformers import CLIPVisionModelWithProjection

        folder = files.folder(self.path, (CONFIG,))
        config = _vision(folder)
        with torch.device("meta"):
            clip = tried(lambda: CLIPVisionModelWithProjection(config), folder)
        return nn.ModuleDict({"clip": clip, "head": blank_head(config.projection_dim)})

    def sizes(self, network: Any) -> tuple[int, int]:
        return network["clip"].config.image_size, 0

    def compute(self, network: Any, pixels: Tensor, tokens: Any) -> Tensor:
        """Return scores [B] in float32, of features of length 1."""
        from torch.nn.functional import normalize

        features = network["clip"](pixel_values=pixels).image_embeds.float()
        return network["head"](normalize(features)).squeeze(1)


def _vision(folder: Any) -> Any:
    """Return the config of the pictures' half of the CLIP in a folder."""
    from transformers import CLIPConfig

    check_config(str(folder))
    whole = tried(lambda: CLIPConfig.from_pretrained(folder), folder)
    whole.vision_config.projection_dim = whole.projection_dim
    return whole.vision_config
