"""The reward hps: Human Preference Score v2.1, a CLIP trained on choices of people (arXiv 2306.09341).

The published file has the tensors of open_clip, which are converted to transformers' CLIPModel here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from attrs import frozen

from corefit.errors import ModelError
from corefit.types import ModelPath
from corefit_rewards import files
from corefit_rewards.clip import TOKENIZERS, ClipReward
from corefit_rewards.models import numbered, read, tried
from corefit_rewards.network import Loaded
from corefit_rewards.pictures import Preprocess

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

PUBLISHED, TOKENIZER = ModelPath("xswu/HPSv2"), ModelPath("openai/clip-vit-large-patch14")
FILES = ("HPS_v2.1_compressed.safetensors", "HPS_v2.1_compressed.pt")
HEAD_WIDTH = {"vision": 80, "text": 64}
"""Numbers of each attention head in open_clip's ViT-H-14; a file of tensors does not say them."""
SIZES: Mapping[str, Mapping[str, int]] = {
    "vision": {"width": 1280, "layers": 32, "inner": 5120, "image_size": 224, "patch_size": 14},
    "text": {"width": 1024, "layers": 24, "inner": 4096, "vocab_size": 49408, "max_position_embeddings": 77},
    "joint": {"width": 1024},
}
"""The sizes of open_clip's ViT-H-14."""
NAMES = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
"""How names of open_clip become those of transformers."""
FUSED = re.compile(r"(.*)\.attn\.in_proj_(weight|bias)")


@frozen(slots=False, kw_only=True)
class Hps(ClipReward):
    """How people would like a picture for its prompt: the cosine of both in HPS v2.1, mostly between 0.2 and 0.35."""

    path: ModelPath = PUBLISHED
    """The file HPS_v2.1_compressed.pt, or the same tensors as .safetensors, a folder that has it, or a hub name."""
    processor: ModelPath = TOKENIZER
    """A folder or name on the hub of a CLIP's tokenizer; all of OpenAI's and open_clip's are the same."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp16"
    """The dtype of the network's weights, in which it computes. Scores are float32. The authors compute in fp16."""

    def check(self) -> None:
        file = files.find(self.path, FILES, fetch=False)
        stored = file and files.header(file)
        if stored is not None and "visual.conv1.weight" not in stored:
            raise _other(file)
        files.check_folder(self.processor, [TOKENIZERS], "processor")

    def load(self, place: torch.device) -> Loaded:
        from transformers import AutoTokenizer, CLIPModel

        file = files.find(self.path, FILES)
        assert file is not None, "what is on the hub is fetched"
        beside = files.folder(self.processor, files.SMALL, "processor")
        tensors = files.tensors(file)
        network = read(CLIPModel, config(tensors, file), dict(renamed(tensors)))
        tokenizer = tried(lambda: AutoTokenizer.from_pretrained(beside), beside)
        size, length = self.sizes(network)
        return Loaded(network, Preprocess.of(place, size, size, whole=True), tokenizer, length)

    def blank(self) -> nn.Module:
        import torch
        from transformers import CLIPModel

        file = files.find(self.path, FILES, fetch=False)
        sizes = _config(SIZES) if file is None else config(files.tensors(file, blank=True), file)
        with torch.device("meta"):
            return CLIPModel(sizes)

    def score_cosine(self, network: Any, cosine: Tensor) -> Tensor:
        return cosine


def config(tensors: Mapping[str, Tensor], file: object) -> Any:
    """Return the CLIPConfig of the tensors of an open_clip file; ModelError if they are others."""
    try:
        patches = tensors["visual.conv1.weight"].shape
        grid = round((tensors["visual.positional_embedding"].shape[0] - 1) ** 0.5)
        vision = {
            "width": patches[0],
            "layers": numbered(tensors, r"visual\.transformer\.resblocks"),
            "inner": tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "image_size": grid * patches[-1],
            "patch_size": patches[-1],
        }
        vocabulary, width = tensors["token_embedding.weight"].shape
        text = {
            "width": width,
            "layers": numbered(tensors, r"transformer\.resblocks"),
            "inner": tensors["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "vocab_size": vocabulary,
            "max_position_embeddings": tensors["positional_embedding"].shape[0],
        }
        return _config({"vision": vision, "text": text, "joint": {"width": tensors["text_projection"].shape[1]}})
    except (KeyError, IndexError, ValueError):
        raise _other(file) from None


def renamed(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of open_clip as transformers' CLIPModel has them; the fused projections become three."""
    for name, tensor in tensors.items():
        if fused := FUSED.fullmatch(name):
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                yield f"{_renamed(fused[1])}.self_attn.{part}_proj.{fused[2]}", third.contiguous()
        elif name in ("visual.proj", "text_projection"):
            half = "visual" if name == "visual.proj" else "text"
            yield f"{half}_projection.weight", tensor.T.contiguous()
        elif name != "attn_mask":
            yield _renamed(name), tensor


def _renamed(name: str) -> str:
    name = f"{name}." if name.rpartition(".")[2].isdigit() else name
    for pattern, new in NAMES:
        name = re.sub(pattern, new, name)
    return name.removesuffix(".")


def _config(sizes: Mapping[str, Mapping[str, int]]) -> Any:
    """Return a CLIPConfig of open_clip's sizes. A prompt's features are those at its largest token, the end."""
    from transformers import CLIPConfig

    halves: dict[str, dict[str, Any]] = {}
    for half in ("vision", "text"):
        own = dict(sizes[half])
        width = own.pop("width")
        halves[half] = {
            "hidden_size": width,
            "num_attention_heads": width // HEAD_WIDTH[half],
            "num_hidden_layers": own.pop("layers"),
            "intermediate_size": own.pop("inner"),
            "hidden_act": "gelu",
            "projection_dim": sizes["joint"]["width"],
            **own,
        }
    end = {"eos_token_id": 2}  # by which transformers takes the largest
    return CLIPConfig(
        vision_config=halves["vision"], text_config=halves["text"] | end, projection_dim=sizes["joint"]["width"]
    )


def _other(file: object) -> ModelError:
    return ModelError(
        f"{file}: not the tensors of open_clip's ViT-H-14, such as visual.conv1.weight; hps reads {FILES[-1]} of "
        f"{PUBLISHED}"
    )
