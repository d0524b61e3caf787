"""What the benchmarks of single steps share: a small SD3 on disk, random pictures, and a trainer's loop over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import frozen

from corefit.data import cache
from corefit.data.dataset import Dataset
from corefit.data.settings import Data
from corefit.system.ranks import join
from corefit.testing import tiny_sd3
from corefit.train.job import Job, Silence
from corefit.train.loop import Loop
from corefit.types import Batch, Example, Meta, ModelPath, Reward, Source, Weighted
from corefit.types.stage import Full, Stage
from corefit_backbones.sd3 import Sd3

if TYPE_CHECKING:
    from torch import Tensor

WORDS = ("picture", "another")
LENGTH = 64
"""Tokens of T5; CLIP adds 16."""
FULL: Mapping[str, Any] = {"layers": 6, "heads": 6, "head_width": 64, "max_latent_size": 96}
"""26M parameters."""
QUICK: Mapping[str, Any] = {"layers": 1, "max_latent_size": 96}
LR = 1e-30
"""So small that no float32 weight changes: every step of every side is the same arithmetic."""


@frozen
class Prompts(Source):
    """A few prompts."""

    count: int

    def examples(self) -> Iterator[Example]:
        for n in range(self.count):
            yield Example(f"picture {n % 10}")


@frozen
class Pictures(Source):
    """So many random pictures of some aspects, two captions each."""

    count: int
    side: int = 48
    aspects: tuple[str, ...] = ("1:1",)

    def examples(self) -> Iterator[Example]:
        for n in range(self.count):
            width, height = (int(side) for side in self.aspects[n % len(self.aspects)].split(":"))
            scale = (self.side**2 / (width * height)) ** 0.5
            shape = (round(height * scale), round(width * scale), 3)
            yield Example((f"picture {n}", f"another {n}"), np.random.default_rng(n).integers(0, 256, shape, np.uint8))


@frozen
class Bright(Reward):
    """How bright a picture is: a reward that costs next to nothing."""

    def score(self, media: Tensor, prompts: Sequence[str], meta: Sequence[Meta]) -> Tensor:
        return media.flatten(1).mean(1)


BRIGHT = (Weighted("bright", Bright()),)


def backbone(folder: Path, quick: bool = False, **sizes: Any) -> Sd3:
    """Write a small SD3 with random weights to `folder`; return it, not loaded, with its encoders on the CPU."""
    import torch

    path = tiny_sd3(folder / "base", words=WORDS, **{**(QUICK if quick else FULL), **sizes})
    made = Sd3(ModelPath(str(path)), max_sequence_length=LENGTH)
    made.place(torch.device("cpu"), torch.float32)
    return made


def dataset(folder: Path, backbone: Sd3, source: Source, *, side: int = 32, media: bool = True) -> Dataset:
    """Encode a source into a cache below `folder`, with media of side x side pixels."""
    aspects = getattr(source, "aspects", ())
    described = Data(source, size=(side, side), aspects=aspects if len(aspects) > 1 else ())
    return Dataset.open(cache.prepare(described, backbone, folder / "cache", media=media))


def loop(folder: Path, backbone: Sd3, dataset: Dataset, stage: Stage) -> Loop:
    """Build the trainer's loop of a stage, in float32 on the CPU."""
    job = Job(
        stage=stage,
        mode=Full(),
        seed=0,
        backbone=backbone,
        dataset=dataset,
        order="epochs",
        folder=folder / "stage",
        listener=Silence(),
    )
    return Loop.build(job, join("fp32"))


def first_batch(loop: Loop) -> Batch:
    """Return the first batch of a loop."""
    with closing(loop.batches()) as batches:
        return next(batches)
