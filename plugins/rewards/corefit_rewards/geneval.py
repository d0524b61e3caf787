"""Reward `geneval`: whether the objects, numbers, colors and positions that a prompt asks for are there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from attrs import field, frozen, validators

from corefit.errors import ConfigError
from corefit.types import ROUNDING, Meta, ModelPath
from corefit_rewards.detector import (
    ColorJudge,
    Detector,
    blank,
    check_clip,
    check_detector,
    labels,
    read_clip,
    read_detector,
)
from corefit_rewards.frames import FrameReward
from corefit_rewards.geneval_rules import Colors, Objects, Wanted, is_correct, most_certain, share, wanted
from corefit_rewards.pixels import scored, whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DETECTOR = ModelPath("facebook/mask2former-swin-small-coco-instance")
CLIP = ModelPath("openai/clip-vit-large-patch14")
share_of_one: Any = [validators.ge(0), validators.le(1)]


def _check_device(_: object, __: object, value: str | None) -> None:
    if value is not None and not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", value):
        raise ValueError(f'\'device\' must be "cpu", "cuda", "cuda:1" or "mps", not {value!r}')


@frozen(slots=False, kw_only=True)
class Geneval(FrameReward):
    """Checks with a detector whether a picture shows what the prompt's metadata ask for, by GenEval's rules.

    Metadata are those of GenEval's evaluation_metadata.jsonl: `tag`, `include` and `exclude`. Colors are judged by
    CLIP, positions by the centers of boxes.
    """

    unit: ClassVar[Literal["", "share"]] = "share"

    detector: ModelPath = DETECTOR
    """A model that finds COCO's objects: a folder, relative to the pipeline file, or a name on the hub. Mask2Former and
    MaskFormer give masks, as GenEval's detector does; others, such as DETR and RT-DETR, give boxes."""
    clip: ModelPath = CLIP
    """The CLIP model that judges colors: a folder, relative to the pipeline file, or a name on the hub."""
    rule: Literal["correct", "strict", "share"] = "correct"
    """"correct" is GenEval's, 1 or 0. "strict" is 1 or 0 as well, and more objects than asked for are wrong. "share" is
    how much of what is asked for is there, from 0 to 1, which Flow-GRPO learns from."""
    threshold: float = field(default=0.3, validator=share_of_one)
    """Objects count if the detector is more certain of them than this."""
    counting_threshold: float = field(default=0.9, validator=share_of_one)
    """The same for prompts whose `tag` is "counting"."""
    max_objects: int = field(default=16, validator=[validators.ge(1), validators.le(10_000)])
    """How many objects of a class count at most: the most certain ones."""
    overlap: float = field(default=1.0, validator=share_of_one)
    """Two objects of a class whose boxes share this part of their union are one. With 1, GenEval's, none ever are."""
    position_threshold: float = field(default=0.1, validator=validators.ge(0))
    """The share of both objects' sizes by which their centers must be apart, to be beside or above one another."""
    batch: int = field(default=8, validator=[validators.ge(1), validators.le(10_000)], metadata=ROUNDING)
    """How many pictures the detector sees at once."""
    device: str | None = field(default=None, validator=_check_device, metadata=ROUNDING)
    """Where the networks are: "cpu", or a GPU such as "cuda:1". By default they are on the device of the media."""

    def check(self) -> None:
        """Raise ModelError where a local folder lacks files or holds a model that cannot be used."""
        check_detector(self.detector)
        check_clip(self.clip)

    def load_blank(self) -> Any:
        """Return both networks on the meta device, or None if no GPU will hold them."""
        return None if self.device in ("cpu", "mps") else blank(self.detector, self.clip)

    def score_pictures(self, pictures: Tensor, prompts: Sequence[str], meta: Sequence[Meta]) -> Tensor:
        """Return scores [B] from 0 to 1; DataError names a prompt whose metadata cannot be used."""
        known = set(labels(self.detector).values())
        asked = [wanted(prompt, one, known) for prompt, one in zip(prompts, meta, strict=True)]
        place = self._place(pictures)

        def judged(rows: Sequence[int]) -> list[float]:
            detector, clip = self._networks(place)
            scores: list[float] = []
            for first in range(0, len(rows), self.batch):
                some = list(rows[first : first + self.batch])
                seen = whole(pictures[some]).to(place)
                for row, picture, found in zip(some, seen, detector.find(seen, self._lowest), strict=True):
                    scores.append(self._score(found, asked[row], partial(clip.colors, picture)))
            return scores

        return scored(pictures, judged)

    def _score(self, found: Objects, asked: Wanted, colors: Colors) -> float:
        """Return the score of one picture."""
        threshold = self.counting_threshold if asked.tag == "counting" else self.threshold
        objects = {name: most_certain(each, threshold, self.max_objects, self.overlap) for name, each in found.items()}
        if self.rule == "share":
            return share(objects, asked, colors, self.position_threshold)
        return float(is_correct(objects, asked, colors, self.position_threshold, strict=self.rule == "strict"))

    @property
    def _lowest(self) -> float:
        return min(self.threshold, self.counting_threshold)

    def _place(self, pictures: Tensor) -> torch.device:
        import torch

        return pictures.device if self.device is None else torch.device(self.device)

    def _networks(self, place: torch.device) -> tuple[Detector, ColorJudge]:
        try:
            return read_detector(self.detector, place), read_clip(self.clip, place)
        except (RuntimeError, AssertionError) as error:
            import torch

            if isinstance(error, torch.OutOfMemoryError):
                raise
            first = str(error).strip().partition("\n")[0]
            raise ConfigError(f'device = "{place}": this machine has no such device ({first})') from None
