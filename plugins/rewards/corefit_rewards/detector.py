"""Models of transformers that find objects in pictures, and CLIP as the judge of their colors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from corefit.errors import ModelError
from corefit_rewards import files
from corefit_rewards.clip import PROCESSOR, TOKENIZERS, blank_clip, check_config, picture_features, text_features
from corefit_rewards.geneval_rules import COLORS, Found, class_name
from corefit_rewards.models import read, tried

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CONFIG = "config.json"
SEGMENT = {"mask2former": "Mask2FormerForUniversalSegmentation", "maskformer": "MaskFormerForInstanceSegmentation"}
"""Families of models that give a mask of each object, and their classes."""
PHRASES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
"""The texts with which GenEval asks CLIP for colors."""
GRAY = 0x99
"""The level of red, green and blue around an object whose color is judged."""


def check_detector(path: str) -> None:
    """Raise ModelError where a local folder lacks files, or holds a model that does not find objects."""
    files.check_folder(path, [(CONFIG,)], "detector")
    here = files.local(path, "detector")
    if here is not None:
        _family(here)
        files.check_folder(path, [(PROCESSOR,), files.WEIGHTS], "detector")
        if not labels(path):
            raise ModelError(f"{here / CONFIG}: it has no id2label, the names of the objects that are found; fetch it")


def check_clip(path: str) -> None:
    """Raise ModelError where a local folder lacks files, or holds another model than a CLIP."""
    files.check_folder(path, [(CONFIG,)], "clip")
    check_config(path)
    files.check_folder(path, [files.WEIGHTS, (PROCESSOR,), TOKENIZERS], "clip")


@cache
def labels(path: str) -> Mapping[int, str]:
    """Return GenEval's names of the classes that a detector finds, by their numbers; config.json alone is read."""
    found = files.settings(files.folder(path, (CONFIG,), "detector") / CONFIG).get("id2label") or {}
    named = {int(number): class_name(str(name)) for number, name in dict(found).items()}
    return {number: name for number, name in named.items() if name != "n/a"}


@cache
def blank(detector: str, clip: str) -> nn.Module:
    """Return both networks on the meta device, without reading weights; the same ones for the same paths."""
    import torch
    from torch import nn

    folder = files.folder(detector, (CONFIG,), "detector")
    with torch.device("meta"):
        network = _made(lambda: _class(folder)(_config(folder)), folder)
    return nn.ModuleList([network, blank_clip(clip)]).to("meta")  # some parameters ignore the device above


@frozen(eq=False)
class Detector:
    """A detector with its processor, on `place`."""

    network: Any
    processor: Any
    names: Mapping[int, str]
    place: torch.device

    def find(self, pictures: Tensor, threshold: float) -> list[dict[str, list[Found]]]:
        """Return the objects in each picture [B, 3, H, W] of bytes that are at least as certain as `threshold`."""
        import torch

        inputs = _prepared(self.processor, list(pictures), self.place)
        with torch.no_grad():
            outputs = self.network(**inputs)
        size = (pictures.shape[-2], pictures.shape[-1])
        if self.network.config.model_type in SEGMENT:
            found = [self._segmented(outputs, row, size, threshold) for row in range(len(pictures))]
        else:
            found = self._boxed(outputs, [size] * len(pictures), threshold)
        return [self._by_class(each) for each in found]

    def _by_class(self, found: Sequence[tuple[int, Found]]) -> dict[str, list[Found]]:
        """Return objects by the names of their classes, without classes that have no name."""
        named = [(self.names[label], one) for label, one in found if label in self.names]
        return {name: [one for other, one in named if other == name] for name, _ in named}

    def _boxed(self, outputs: Any, sizes: Sequence[tuple[int, int]], threshold: float) -> list[list[tuple[int, Found]]]:
        """Return number of class and object for all that a detector of boxes finds; they end at the picture's edges."""
        found = self.processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=list(sizes))
        return [
            [
                (int(label), Found(_inside(box, *size), float(score)))
                for score, label, box in zip(
                    *(each[key].tolist() for key in ("scores", "labels", "boxes")), strict=True
                )
            ]
            for each, size in zip(found, sizes, strict=True)
        ]

    def _segmented(self, outputs: Any, row: int, size: tuple[int, int], threshold: float) -> list[tuple[int, Found]]:
        """Return number of class and object for all that a model with masks finds in one picture."""
        one = promising(outputs, row, threshold)
        if one is None:
            return []
        (found,) = self.processor.post_process_instance_segmentation(
            one, threshold=threshold, target_sizes=[size], return_binary_maps=True
        )
        segments = found["segments_info"]
        masks = found["segmentation"].bool() if segments else []
        return [
            (segment["label_id"], Found(around(mask), segment["score"], mask))
            for segment, mask in zip(segments, masks, strict=True)
        ]


@frozen
class _Queries:
    """The part of a model's outputs that its processor reads."""

    class_queries_logits: Any
    masks_queries_logits: Any


def promising(outputs: Any, row: int, threshold: float) -> _Queries | None:
    """Return one picture's outputs on the CPU, without queries that cannot become objects; None if there are no others.

    An object's certainty is at most its class's probability. The processor ranks as many pairs of query and class as
    there are queries, so as many queries are left as there are probable pairs.
    """
    probability = outputs.class_queries_logits[row].float().softmax(-1)[:, :-1]
    pairs = int((probability >= threshold).sum())
    if not pairs:
        return None
    best = probability.amax(-1).topk(min(pairs, len(probability))).indices
    kept = (
        each[row, best][None].float().cpu() for each in (outputs.class_queries_logits, outputs.masks_queries_logits)
    )
    return _Queries(*kept)


def around(mask: Tensor) -> tuple[float, float, float, float]:
    """Return the smallest box around a mask [H, W] that is not empty; right and bottom are the edges of its pixels."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1


def _inside(box: Sequence[float], height: int, width: int) -> tuple[float, float, float, float]:
    left, top, right, bottom = box
    return (
        min(max(left, 0.0), float(width)),
        min(max(top, 0.0), float(height)),
        min(max(right, 0.0), float(width)),
        min(max(bottom, 0.0), float(height)),
    )


@frozen(eq=False)
class ColorJudge:
    """CLIP, which chooses among GenEval's colors for what a crop of a picture shows, on `place`."""

    network: Any
    processor: Any
    tokenizer: Any
    place: torch.device
    _texts: dict[str, Tensor] = field(factory=dict[str, "Tensor"], init=False)

    def colors(self, picture: Tensor, name: str, found: Sequence[Found]) -> list[str]:
        """Return the color of each object of class `name` in a picture [3, H, W] of bytes."""
        import torch

        if not found:
            return []
        crops = [crop(picture, one) for one in found]
        inputs = _prepared(self.processor, crops, self.place)
        with torch.no_grad():
            shown = picture_features(self.network, inputs["pixel_values"])
        chosen = (shown.float() @ self._classifier(name).T).argmax(1)  # the length of `shown` changes no choice
        return [COLORS[number] for number in chosen.tolist()]

    def _classifier(self, name: str) -> Tensor:
        """Return a direction [10, D] for each color: the mean of those of the phrases."""
        import torch
        from torch.nn.functional import normalize

        if name not in self._texts:
            texts = [phrase.format(color=color, name=name) for color in COLORS for phrase in PHRASES]
            tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.place)
            with torch.no_grad():
                features = normalize(text_features(self.network, **tokens).float(), dim=-1)
            self._texts[name] = normalize(features.reshape(len(COLORS), len(PHRASES), -1).mean(1), dim=-1)
        return self._texts[name]


def crop(picture: Tensor, found: Found) -> Tensor:
    """Return the box of an object [3, h, w] in a picture [3, H, W] of bytes; gray around its mask."""
    import torch

    if found.mask is not None:
        picture = torch.where(found.mask.to(picture.device), picture, torch.full_like(picture, GRAY))
    left, top, right, bottom = (round(edge) for edge in found.box)
    height, width = picture.shape[1:]
    left, top = min(left, width - 1), min(top, height - 1)
    return picture[:, top : max(bottom, top + 1), left : max(right, left + 1)]


def _prepared(processor: Any, pictures: Sequence[Tensor], place: torch.device) -> Any:
    """Return what a network takes of pictures [3, H, W] of bytes, made by its processor on the device `place`."""
    made = processor(images=list(pictures), return_tensors="pt", input_data_format="channels_first", device=place)
    return made.to(place)


# reading


@cache
def read_detector(path: str, place: torch.device) -> Detector:
    """Return the detector of a folder or a name on the hub; it is read once in each process."""
    folder = files.weights_folder(path)
    network = _made(lambda: read(_class(folder), _config(folder), folder), folder)
    return Detector(network.requires_grad_(False).eval().to(place), _processor(folder), labels(path), place)


@cache
def read_clip(path: str, place: torch.device) -> ColorJudge:
    """Return the CLIP of a folder or a name on the hub; it is read once in each process."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    folder = files.weights_folder(path)
    check_config(str(folder))
    network = read(CLIPModel, CLIPConfig.from_pretrained(folder), folder)
    tokenizer = tried(lambda: AutoTokenizer.from_pretrained(folder), folder)
    return ColorJudge(network.requires_grad_(False).eval().to(place), _processor(folder), tokenizer, place)


def _processor(folder: Path) -> Any:
    """Return what prepares pictures for a model, the one that works with tensors on any device."""
    import transformers

    version = int(transformers.__version__.partition(".")[0])
    kind: dict[str, Any] = {"use_fast": True} if version < 5 else {"backend": "torchvision"}
    return tried(lambda: transformers.AutoImageProcessor.from_pretrained(folder, **kind), folder)


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return tried(lambda: AutoConfig.from_pretrained(folder), folder)


def _made(make: Callable[[], Any], folder: Path) -> Any:
    """Call what makes a model; ModelError if it needs a package that is missing, or fails otherwise."""
    try:
        return tried(make, folder)
    except ImportError as error:  # some detectors have backbones of the package timm
        said = " ".join(str(error).split())
        raise ModelError(f"{folder}: this model needs a package that is not installed: {said}") from None


def _class(folder: Path) -> Any:
    """Return the class of the model in a folder."""
    import transformers

    return getattr(transformers, _family(folder))


def _family(folder: Path) -> str:
    """Return the name of the class of the model in a folder; ModelError if it does not find objects."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

    found = files.settings(folder / CONFIG).get("model_type")
    known: dict[str, str] = {**MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES, **SEGMENT}
    if found not in known:
        raise ModelError(
            f"{folder / CONFIG}: its model_type is {found!r}, which is no detector; 'detector' names one of "
            f"{', '.join(sorted(known))}"
        )
    return known[found]
