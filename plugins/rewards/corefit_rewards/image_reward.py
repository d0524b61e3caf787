"""The reward image_reward: ImageReward v1.0, a BLIP that was trained on rankings of people (arXiv 2304.05977)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import frozen

from corefit.errors import ModelError
from corefit.types import ModelPath
from corefit_rewards import files
from corefit_rewards.models import blank_head, linear_head, numbered, read, tried
from corefit_rewards.network import Loaded, NetworkReward
from corefit_rewards.pictures import Preprocess

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

PUBLISHED, TOKENIZER = ModelPath("THUDM/ImageReward"), ModelPath("google-bert/bert-base-uncased")
FILES = ("ImageReward.safetensors", "ImageReward.pt")
TOKENIZERS = ("tokenizer.json", "vocab.txt")
LENGTH = 35
"""Tokens to which prompts are cut and padded, as published."""
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and standard deviation of the head's results on the authors' data; scores are normalized by them."""
HEAD_WIDTH = 64
"""Numbers of each attention head in ViT-L and in BERT; a file of tensors does not say them."""
SIZES: Mapping[str, Mapping[str, int]] = {
    "vision": {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096, "image_size": 224}
    | {"patch_size": 16},
    "text": {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072, "vocab_size": 30524}
    | {"max_position_embeddings": 512, "encoder_hidden_size": 1024},
}
"""The sizes of ViT-L/16 and of BLIP's BERT."""
NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
)
"""How names of BLIP's picture encoder become those of transformers; the text encoder has the same in both."""


@frozen(slots=False, kw_only=True)
class ImageReward(NetworkReward):
    """How people would rank a picture for its prompt: about 0 on average over the authors' data, mostly -2 to 2."""

    path: ModelPath = PUBLISHED
    """The file ImageReward.pt, or the same tensors as .safetensors, a folder that has it, or a name on the hub."""
    tokenizer: ModelPath = TOKENIZER
    """A folder or name on the hub of BERT's tokenizer for lower case."""

    def check(self) -> None:
        file = files.find(self.path, FILES, fetch=False)
        stored = file and files.header(file)
        if stored is not None and "mlp.layers.0.weight" not in stored:
            raise _other(file)
        files.check_folder(self.tokenizer, [TOKENIZERS], "tokenizer")

    def load(self, place: torch.device) -> Loaded:
        from torch import nn
        from transformers import AutoTokenizer, BlipTextModel, BlipVisionModel

        file = files.find(self.path, FILES)
        assert file is not None, "what is on the hub is fetched"
        beside = files.folder(self.tokenizer, files.SMALL, "tokenizer")
        tensors = files.tensors(file)
        vision, text = configs(tensors, file)
        parts = {
            "vision": read(BlipVisionModel, vision, {_renamed(k): v for k, v in _under(tensors, VISION).items()}),
            "text": read(BlipTextModel, text, _under(tensors, TEXT), add_pooling_layer=False),
            "head": linear_head(_under(tensors, "mlp."), file),
        }
        tokenizer = tried(lambda: AutoTokenizer.from_pretrained(beside), beside)
        size, length = self.sizes(parts)
        return Loaded(nn.ModuleDict(parts), Preprocess.of(place, size, size), tokenizer, length)

    def blank(self) -> nn.Module:
        import torch
        from torch import nn
        from transformers import BlipTextModel, BlipVisionModel

        file = files.find(self.path, FILES, fetch=False)
        vision, text = _configs(SIZES) if file is None else configs(files.tensors(file, blank=True), file)
        with torch.device("meta"):
            parts = {"vision": BlipVisionModel(vision), "text": BlipTextModel(text, add_pooling_layer=False)}
        return nn.ModuleDict({**parts, "head": blank_head(text.hidden_size)})

    def sizes(self, network: Any) -> tuple[int, int]:
        return network["vision"].config.image_size, min(LENGTH, network["text"].config.max_position_embeddings)

    def compute(self, network: Any, pixels: Tensor, tokens: Any) -> Tensor:
        """Return scores [B] in float32, of what the text encoder makes of a prompt's first token and the picture."""
        seen = network["vision"](pixel_values=pixels).last_hidden_state
        joint = _read_with(network["text"], tokens["input_ids"], tokens["attention_mask"], seen)
        return (network["head"](joint[:, 0].float()).squeeze(1) - MEAN) / STD


def _read_with(text: Any, words: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
    """Return what BlipTextModel makes of prompts and pictures, [B, L, D], reading prompts in both directions.

    Its own forward asks in transformers 5 whether anything is masked, and so waits for the device.
    """
    import torch

    hidden = text.embeddings(input_ids=words)
    hidden_words = (1 - mask[:, None, None, :].to(hidden.dtype)) * torch.finfo(hidden.dtype).min
    return text.encoder(hidden, attention_mask=hidden_words, encoder_hidden_states=seen).last_hidden_state


VISION, TEXT = "blip.visual_encoder.", "blip.text_encoder."


def configs(tensors: Mapping[str, Tensor], file: object) -> tuple[Any, Any]:
    """Return BlipVisionConfig and BlipTextConfig of an ImageReward file's tensors; ModelError if they are others."""
    try:
        patches, words = tensors[f"{VISION}patch_embed.proj.weight"].shape, f"{TEXT}embeddings.word_embeddings.weight"
        grid = round((tensors[f"{VISION}pos_embed"].shape[1] - 1) ** 0.5)
        vision = {
            "hidden_size": patches[0],
            "num_hidden_layers": numbered(tensors, re.escape(f"{VISION}blocks")),
            "intermediate_size": tensors[f"{VISION}blocks.0.mlp.fc1.weight"].shape[0],
            "image_size": grid * patches[-1],
            "patch_size": patches[-1],
        }
        text = {
            "hidden_size": tensors[words].shape[1],
            "num_hidden_layers": numbered(tensors, re.escape(f"{TEXT}encoder.layer")),
            "intermediate_size": tensors[f"{TEXT}encoder.layer.0.intermediate.dense.weight"].shape[0],
            "vocab_size": tensors[words].shape[0],
            "max_position_embeddings": tensors[f"{TEXT}embeddings.position_embeddings.weight"].shape[0],
            "encoder_hidden_size": tensors[f"{TEXT}encoder.layer.0.crossattention.self.key.weight"].shape[1],
        }
        return _configs({"vision": vision, "text": text})
    except (KeyError, IndexError):
        raise _other(file) from None


def _configs(sizes: Mapping[str, Mapping[str, int]]) -> tuple[Any, Any]:
    from transformers import BlipTextConfig, BlipVisionConfig

    widths: Mapping[str, Mapping[str, Any]] = sizes
    heads: dict[str, dict[str, Any]] = {
        half: {"num_attention_heads": own["hidden_size"] // HEAD_WIDTH} for half, own in sizes.items()
    }
    vision = BlipVisionConfig(**widths["vision"], **heads["vision"], hidden_act="gelu", layer_norm_eps=1e-6)
    # is_decoder makes the layers that attend to the picture
    text = BlipTextConfig(**widths["text"], **heads["text"], hidden_act="gelu", layer_norm_eps=1e-12, is_decoder=True)
    return vision, text


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _renamed(name: str) -> str:
    for pattern, new in NAMES:
        name = re.sub(pattern, new, name)
    return name


def _other(file: object) -> ModelError:
    return ModelError(
        f"{file}: not the tensors of ImageReward, such as mlp.layers.0.weight; image_reward reads "
        f"{FILES[-1]} of {PUBLISHED}"
    )
