"""What a slow reward costs: a Flow-GRPO step where it scores in a thread, against one where the model waits for it."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import attrs
import click
from attrs import frozen

from benchmarks import timing
from corefit.data import cache
from corefit.data.dataset import Dataset
from corefit.data.settings import Data
from corefit.samplers import Cps
from corefit.system.ranks import join
from corefit.testing import tiny_sd3
from corefit.train.job import Job, Silence
from corefit.train.loop import Loop
from corefit.types import Batch, Example, Meta, ModelPath, Reward, Weighted
from corefit.types.stage import Full, Optimizer, Stage
from corefit_backbones.sd3 import Sd3
from corefit_flow_grpo import FlowGrpo

if TYPE_CHECKING:
    from torch import Tensor

TARGET = 0.75
BATCH, MICRO_BATCH = 32, 4


@frozen
class Prompts:
    """A few prompts."""

    def examples(self) -> Iterator[Example]:
        for n in range(BATCH):
            yield Example(f"picture {n % 10}")


@frozen
class Waits(Reward):
    """Sleeps before it answers, as a service elsewhere does: no computation here."""

    seconds: float

    def score(self, media: Tensor, prompts: Sequence[str], meta: Sequence[Meta]) -> Tensor:
        time.sleep(self.seconds)
        return media.flatten(1).mean(1)


class WaitsAside(Waits):
    """The same in a thread of its own."""

    concurrent: ClassVar[bool] = True


@click.command("scoring")
@click.option("--rounds", default=6, show_default=True, type=click.IntRange(2), help="Of a step each way.")
@click.option("--quick", is_flag=True, help="Seconds; a tiny network: shows that it works, times mean nothing.")
@click.option("--json", "file", type=click.Path(path_type=Path, dir_okay=False), help="Write the figures there too.")
def scoring(rounds: int, quick: bool, file: Path | None) -> None:
    """Time steps with a reward that sleeps, in a thread and not, in turns (2 minutes)."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        loop = _loop(Path(folder), layers=1 if quick else 6)
        with closing(loop.batches()) as batches:
            batch = next(batches)
        _timed(loop, Waits(0.0), batch)
        # as long as a micro-batch takes: then it is hidden behind the next one, or nearly so
        seconds = _timed(loop, Waits(0.0), batch) / (BATCH // MICRO_BATCH) / 2
        sides = {"waits": Waits(seconds), "thread": WaitsAside(seconds)}
        found = {name: list[float]() for name in sides}
        for number in range(rounds):
            for name in sides if number % 2 else reversed(sides):
                found[name].append(_timed(loop, sides[name], batch))
    ratio = timing.Spread.of([a / b for a, b in zip(found["thread"], found["waits"], strict=True)])
    one, other = (timing.Spread.of(found[name]).median for name in ("waits", "thread"))
    click.echo(
        f"{BATCH // MICRO_BATCH} micro-batches a step, each scored in {1000 * seconds:.0f} ms: a step takes {one:.2f} s"
        f" where the model waits, {other:.2f} s where it does not"
    )
    verdict = "not judged" if quick else "ok" if ratio.median <= TARGET else "MISSED"
    click.echo(
        f"thread / waits, seconds of the clock: {ratio.median:.3f} (quartiles {ratio.low:.3f} .. {ratio.high:.3f}), "
        f"target {TARGET}: {verdict}"
    )
    if file:
        file.write_text(json.dumps({"machine": timing.machine(), "ratio": attrs.asdict(ratio), "seconds": found}))


def _timed(loop: Loop, reward: Reward, batch: Batch) -> float:
    """Seconds of the clock that a step takes: a thread that waits computes nothing."""
    loop.ctx = attrs.evolve(loop.ctx, rewards=[Weighted("waits", reward)])
    began = time.perf_counter()
    loop.take_step(batch)
    return time.perf_counter() - began


def _loop(folder: Path, layers: int) -> Loop:
    """Flow-GRPO of a network of 26M parameters, or a tiny one; the learning rate leaves its weights as they are."""
    import torch

    path = tiny_sd3(folder / "base", words=["picture"], layers=layers, heads=6, head_width=64, max_latent_size=96)
    backbone = Sd3(ModelPath(str(path)), max_sequence_length=64)
    backbone.place(torch.device("cpu"), torch.float32)
    described = Data(Prompts(), size=(32, 32))
    dataset = Dataset.open(cache.prepare(described, backbone, folder / "cache", media=False))
    stage = Stage(
        name="benchmark",
        steps=10**6,
        objective=FlowGrpo(group=4, steps=4, guidance=1.0, window=1),
        sampler=Cps(),
        reward=(Weighted("waits", Waits(0.0)),),
        batch=BATCH,
        micro_batch=MICRO_BATCH,
        optimizer=Optimizer(lr=1e-12),
    )
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
