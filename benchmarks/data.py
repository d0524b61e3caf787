"""What reading from the cache costs: a step on batches from it against the same step on batches that are in memory."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import attrs
import click
import numpy as np
from attrs import frozen

from benchmarks import timing
from corefit.data import cache
from corefit.data.dataset import Dataset
from corefit.data.settings import Data
from corefit.system.ranks import join
from corefit.testing import tiny_sd3
from corefit.train.job import Job, Silence
from corefit.train.loop import Loop
from corefit.types import Batch, Example, ModelPath
from corefit.types.stage import Full, Optimizer, Stage
from corefit_backbones.sd3 import Sd3
from corefit_sft import Sft

TARGET = 1.02
BATCH, STEPS = 16, 10
ASPECTS = ("1:1", "4:3", "3:4", "16:9", "9:16")


@frozen
class Pictures:
    """So many random pictures of five aspects, two captions each."""

    count: int

    def examples(self) -> Iterator[Example]:
        for n in range(self.count):
            width, height = (int(side) for side in ASPECTS[n % len(ASPECTS)].split(":"))
            scale = (48 * 48 / (width * height)) ** 0.5
            shape = (round(height * scale), round(width * scale), 3)
            yield Example((f"picture {n}", f"another {n}"), np.random.default_rng(n).integers(0, 256, shape, np.uint8))


@click.command("data")
@click.option("--rounds", default=6, show_default=True, type=click.IntRange(2), help=f"Of {STEPS} steps each way.")
@click.option("--count", default=1024, show_default=True, type=click.IntRange(BATCH), help="Examples.")
@click.option("--json", "file", type=click.Path(path_type=Path, dir_okay=False), help="Write the figures there too.")
def data(rounds: int, count: int, file: Path | None) -> None:
    """Time steps on batches from the cache and on batches in memory, in turns (4 minutes)."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        loop = _loop(Path(folder), count)
        encoded = time.perf_counter() - began
        size = sum(f.stat().st_size for f in Path(folder, "cache").rglob("*.mds")) / count
        found = {"cache": list[float](), "memory": list[float]()}
        with closing(loop.batches()) as cached, closing(loop.batches()) as same:
            for number in range(rounds + 1):
                sides = [("cache", cached), ("memory", iter(list(islice(same, STEPS))))]
                for name, batches in sides if number % 2 else sides[::-1]:
                    seconds = _timed(loop, batches)
                    if number:  # the first round warms up
                        found[name].append(seconds)
    ratio = timing.Spread.of([a / b for a, b in zip(found["cache"], found["memory"], strict=True)])
    step = float(np.median(found["memory"])) / STEPS
    click.echo(f"{count} examples encoded in {encoded:.1f} s, {size / 1024:.1f} KiB each; a step {1000 * step:.0f} ms")
    verdict = "ok" if ratio.median <= TARGET else "MISSED"
    click.echo(
        f"cache / memory, CPU seconds: {ratio.median:.3f} (quartiles {ratio.low:.3f} .. {ratio.high:.3f}), "
        f"target {TARGET}: {verdict}"
    )
    if file:
        file.write_text(json.dumps({"machine": timing.machine(), "ratio": attrs.asdict(ratio), "seconds": found}))


def _timed(loop: Loop, batches: Iterator[Batch]) -> float:
    """CPU seconds of all threads, that which reads ahead too: on a GPU it would not be waited for."""
    began = time.process_time()
    for batch in islice(batches, STEPS):
        loop.take_step(batch)
    return time.process_time() - began


def _loop(folder: Path, count: int) -> Loop:
    """SFT of a network of 26M parameters on a data set that was encoded into `folder`."""
    import torch

    path = tiny_sd3(folder / "base", words=["picture", "another"], layers=6, heads=6, head_width=64, max_latent_size=96)
    backbone = Sd3(ModelPath(str(path)), max_sequence_length=64)
    backbone.place(torch.device("cpu"), torch.float32)
    described = Data(Pictures(count), size=(32, 32), aspects=ASPECTS)
    dataset = Dataset.open(cache.prepare(described, backbone, folder / "cache", media=True))
    stage = Stage(name="benchmark", steps=10**6, objective=Sft(), batch=BATCH, optimizer=Optimizer(lr=1e-9))
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
