"""CLIP of transformers: how its folders are checked and read, and the cosine of pictures and prompts."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from attrs import frozen

from corefit.errors import ModelError
from corefit_rewards import files
from corefit_rewards.models import read, tried
from corefit_rewards.network import Loaded, NetworkReward
from corefit_rewards.pictures import Preprocess

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
TOKENIZERS = ("tokenizer.json", "vocab.json")
"""Files of a tokenizer, of which a folder must have one."""


@frozen(slots=False, kw_only=True)
class ClipReward(NetworkReward):
    """Base of rewards that compare pictures with prompts by a CLIPModel; a subclass writes `score_features`."""

    def check_clip(self, path: str, processor: str) -> None:
        """Raise ModelError where local folders lack what `load_clip` reads."""
        files.check_folder(path, [(CONFIG,), files.WEIGHTS])
        check_config(path)
        files.check_folder(processor, [(PROCESSOR,), TOKENIZERS], "path" if processor == path else "processor")

    def load_clip(self, path: str, processor: str, place: torch.device) -> Loaded:
        """Read CLIPModel from the folder or name `path`; tokenizer and preprocessing from `processor`."""
        from transformers import AutoTokenizer, CLIPConfig, CLIPModel

        folder, beside = files.weights_folder(path), files.folder(processor, files.SMALL, "processor")
        network = read(CLIPModel, CLIPConfig.from_pretrained(folder), folder)
        config = files.settings(beside / PROCESSOR)
        tokenizer = tried(lambda: AutoTokenizer.from_pretrained(beside), beside)
        _, length = self.sizes(network)
        return Loaded(network, Preprocess.read(place, config, str(beside / PROCESSOR)), tokenizer, length)

    def sizes(self, network: Any) -> tuple[int, int]:
        return network.config.vision_config.image_size, network.config.text_config.max_position_embeddings

    def compute(self, network: Any, pixels: Tensor, tokens: Any) -> Tensor:
        """Return scores [B]; padding follows the end of a prompt, where the causal network does not see it."""
        from torch.nn.functional import cosine_similarity

        pictures = picture_features(network, pixels).float()
        prompts = text_features(network, input_ids=tokens["input_ids"]).float()
        return self.score_cosine(network, cosine_similarity(pictures, prompts))

    def features(self, media: Tensor) -> Tensor:
        """Return CLIP's features [B, D] of pictures, or of the first frames of clips, for measures of diversity."""
        loaded, pixels = self.encoded(media)
        network: Any = loaded.network
        return picture_features(network, pixels).float().to(media.device)

    @abstractmethod
    def score_cosine(self, network: Any, cosine: Tensor) -> Tensor:
        """Return scores [B] of the cosines [B] of pictures and prompts."""


def picture_features(network: Any, pixels: Tensor) -> Tensor:
    """Return the features [B, D] of pictures; what CLIPModel.get_image_features returns differs between versions."""
    return network.visual_projection(network.vision_model(pixel_values=pixels).pooler_output)


def text_features(network: Any, **tokens: Tensor) -> Tensor:
    """Return the features [B, D] of prompts, given their tokens by name."""
    return network.text_projection(network.text_model(**tokens).pooler_output)


def blank_clip(path: str) -> nn.Module:
    """Return the CLIPModel of a folder or name on the meta device; of the folder, config.json alone is read."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    folder = files.folder(path, (CONFIG,))
    check_config(str(folder))
    with torch.device("meta"):
        return tried(lambda: CLIPModel(CLIPConfig.from_pretrained(folder)), folder)


def check_config(path: str) -> None:
    """Raise ModelError where the config.json of a local folder is no CLIP's."""
    folder = files.local(path)
    if folder is not None:
        kind = files.settings(folder / CONFIG).get("model_type")
        if kind != "clip":
            raise ModelError(f"{folder / CONFIG}: its model_type is {kind!r}; this reward reads a CLIP model, 'clip'")
