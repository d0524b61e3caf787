"""CLIP of transformers: how its folders are checked and read, and the cosine of pictures and prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from corefit.errors import ModelError
from corefit_rewards import files
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
        """Return scores [B] in float32; padding is behind the end of a prompt, which the causal network does not see."""
        from torch.nn.functional import cosine_similarity

        pictures = network.get_image_features(pixel_values=pixels).float()
        prompts = network.get_text_features(input_ids=tokens["input_ids"]).float()
        return self.score_cosine(network, cosine_similarity(pictures, prompts))

    @abstractmethod
    def score_cosine(self, network: Any, cosine: Tensor) -> Tensor:
        """Return scores [B] of the cosines [B] of pictures and prompts."""


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


def read(kind: Any, config: Any, source: Path | Mapping[str, Tensor], **keys: Any) -> Any:
    """Return a model of transformers in float32, read from a folder or made of tensors by their names.

    Raises ModelError where files cannot be read, and where weights are missing or of another shape, which transformers
    would fill with random numbers.
    """
    folder = source if isinstance(source, Path) else None
    state = {} if folder else {"state_dict": dict(source)}  # pyright: ignore[reportArgumentType,reportCallIssue]
    network, info = tried(
        lambda: kind.from_pretrained(
            folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **state, **keys
        ),
        folder,
    )
    wrong = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelError(
            f"{folder or 'the file'}: its weights lack {', '.join(wrong[:3])}{more}, or have them in another shape than "
            "the config says; fetch the whole model again"
        )
    return network


def tried(make: Callable[[], Any], place: object) -> Any:
    """Call what reads files, and turn its errors into a ModelError that names the place."""
    from safetensors import SafetensorError

    try:
        return make()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ModelError(f"{place}: transformers cannot read it: {first or type(error).__name__}") from error
