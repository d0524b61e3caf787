"""Training without a pipeline file: a tiny checkpoint, noise as pictures, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import frozen

from corefit import Example, Source
from corefit.data import cache
from corefit.data.dataset import Dataset
from corefit.data.settings import Data
from corefit.system import ranks
from corefit.train import loop as train
from corefit.train.job import Listener
from corefit.types.stage import Full, Optimizer, Stage
from corefit_backbones.sd3 import Sd3
from corefit_sft import Sft


@frozen
class Pictures(Source):
    """Noise as pictures."""

    count: int = 12

    def examples(self) -> Iterator[Example]:
        for i in range(self.count):
            picture = np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)
            yield Example(f"a {'red' if i % 2 else 'blue'} {i % 10}", picture, {"n": i})


@frozen(kw_only=True, eq=False)
class Heard(Listener):
    """A listener of functions."""

    on_started: Callable[[int], object] = lambda step: None
    on_logged: Callable[[int, Mapping[str, float]], object] = lambda step, metrics: None
    on_stepped: Callable[[int], object] = lambda step: None
    on_alarmed: Callable[[str], object] = lambda text: None
    on_ended: Callable[[int, str], object] = lambda step, text: None
    asked: Callable[[], bool] = lambda: False

    def started(self, step: int) -> None:
        self.on_started(step)

    def logged(self, step: int, metrics: Mapping[str, float]) -> None:
        self.on_logged(step, metrics)

    def stepped(self, step: int, metrics: Mapping[str, float]) -> None:
        self.on_stepped(step)

    def saved(self, step: int, path: Path) -> None:
        pass

    def alarmed(self, text: str) -> None:
        self.on_alarmed(text)

    def ended(self, step: int, text: str) -> None:
        self.on_ended(step, text)

    def stop_requested(self) -> bool:
        return self.asked()


def prepared(checkpoint: Path, root: Path) -> Dataset:
    """The pictures, encoded."""
    backbone = Sd3(path=str(checkpoint), max_sequence_length=12)
    backbone.place(torch.device("cpu"), torch.float32)
    return Dataset.open(cache.prepare(Data(Pictures(), size=(16, 16)), backbone, root, media=True))


def job_of(
    checkpoint: Path, dataset: Dataset, folder: Path, objective: Any = None, mode: Any = None, **stage: Any
) -> train.Job:
    """A stage of three steps of SFT on all weights, unless told otherwise."""
    stage = {"name": "s", "steps": 3, "batch": 8, "optimizer": Optimizer(lr=1e-3), **stage}
    return train.Job(
        stage=Stage(objective=objective or Sft(), **stage),
        mode=mode or Full(),
        seed=0,
        backbone=Sd3(path=str(checkpoint), max_sequence_length=12),
        dataset=dataset,
        order="epochs",
        folder=folder,
        listener=Heard(),
    )


def trained(job: train.Job, on: ranks.Ranks | None = None) -> dict[str, torch.Tensor]:
    """The weights after training, in fp32 unless `on` is in another precision."""
    train.train(job, on or ranks.join("fp32"))
    return {name: p.detach().clone() for name, p in job.backbone.transformer.named_parameters() if p.requires_grad}


def worst(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).detach().abs().max()) for name in a)
