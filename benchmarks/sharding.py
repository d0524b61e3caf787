"""Peak memory of two processes that share a network (FSDP2): while it is read, trained, saved and evaluated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from attrs import define, field

from corefit.pipeline import read
from corefit.run.evaluation import evaluator as evaluate
from corefit.run.run import run
from corefit.system import memory
from corefit.train import loop as train
from corefit.train import weights

PHASES = ("read", "train", "checkpoint", "save", "evaluate")
MOST_OF_TRAINING, MOST_OF_WEIGHTS = 1.15, 1.3
WIDTH, QUICK = 16, 8
"""Attention heads of 64: 9 layers of 16 are 330M parameters."""
PIPELINE = """\
name = "sharded"
shard = true
precision = "fp32"
plugins = ["bright.py"]

[backbone]
use = "sd3"
path = "base"
max_sequence_length = 16

[data]
source = { use = "jsonl", path = "train.jsonl" }
size = [16, 16]

[[stage]]
name = "sft"
steps = 3
batch = 4
objective = { use = "sft" }

[eval]
prompts = "train.jsonl"
reward = [{ use = "bright" }]
steps = 2
"""
BRIGHT = """\
from attrs import frozen
from corefit import Reward, hookimpl

@frozen
class Bright(Reward):
    def score(self, media, prompts, meta):
        return media.flatten(1).mean(1)

@hookimpl
def corefit_rewards():
    return {"bright": Bright}
"""


@define
class Peaks:
    """The most bytes that were resident in each phase of this process, and before any."""

    device: Any
    found: dict[str, int] = field(factory=dict[str, int])

    def watch(self, owner: Any, name: str, phase: str) -> None:
        """Measure every call of a function from now on."""
        called = getattr(owner, name)

        def measured(*args: Any, **keys: Any) -> Any:
            memory.reset_peak(self.device)
            try:
                return called(*args, **keys)
            finally:
                self.found[phase] = max(self.found.get(phase, 0), memory.peak(self.device))

        setattr(owner, name, measured)


def worker(folder: Path) -> None:
    """Run the pipeline in `folder` as one of its processes, and write what it took."""
    import torch

    torch.set_num_threads(1)
    pipeline = read(folder / "pipeline.toml")
    peaks = Peaks(torch.device("cpu"))
    for module in ("corefit.run.run", "corefit.rollout", "diffusers", "peft", "torch.distributed.fsdp", "PIL.Image"):
        __import__(module)
    peaks.found["before"] = memory.peak(peaks.device)
    peaks.watch(weights, "load", "read")
    peaks.watch(train.Loop, "take_step", "train")
    peaks.watch(train.Loop, "save", "checkpoint")
    peaks.watch(weights, "save", "save")
    peaks.watch(evaluate.Evaluator, "score", "evaluate")
    run(pipeline)
    (folder / f"peaks-{os.environ['RANK']}.json").write_text(json.dumps(peaks.found))


def project(folder: Path, heads: int) -> int:
    """Write a project with a network of 9 layers; bytes of its weights."""
    import numpy as np
    from PIL import Image
    from safetensors import safe_open

    from corefit.testing import tiny_sd3

    tiny_sd3(folder / "base", words=("a", "red", "sky"), layers=9, heads=heads, head_width=64)
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    lines = (json.dumps({"media": f"{n}.png", "prompt": "a red sky", "category": str(n % 2)}) for n in range(8))
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "bright.py").write_text(BRIGHT)
    (folder / "pipeline.toml").write_text(PIPELINE)
    with safe_open(folder / "base" / "transformer" / "diffusion_pytorch_model.safetensors", "np") as file:
        return 4 * sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118


def verdicts(ranks: list[Mapping[str, int]], held: int) -> Mapping[str, tuple[float, float]]:
    """What was promised: figure and limit."""
    found: dict[str, tuple[float, float]] = {}
    for phase in ("read", "checkpoint", "save", "evaluate"):
        worst = max(rank[phase] / rank["train"] for rank in ranks)
        more = sum(rank[phase] - rank["train"] for rank in ranks) / held
        found[f"{phase}: a process, of its peak in training"] = worst, MOST_OF_TRAINING
        found[f"{phase}: all, beyond training, in sizes of the weights"] = more, MOST_OF_WEIGHTS
    return found


@click.command()
@click.option("--quick", is_flag=True, help="A small network: shows that it works.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the figures there as well.")
@click.option("--assert", "strict", is_flag=True, help="Exit status 1 where a limit is passed.")
def sharding(quick: bool, file: Path | None, strict: bool) -> None:
    """Memory of two processes that share a network of 300M parameters, in each phase of a run (2 minutes, 12 GB)."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        held = project(folder, QUICK if quick else WIDTH)
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
        command = [sys.executable, *launcher, "-m", "benchmarks.sharding", str(folder)]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1], env={**os.environ, "OMP_NUM_THREADS": "1"})
        ranks = [json.loads((folder / f"peaks-{rank}.json").read_text()) for rank in range(2)]
    click.echo(f"\nweights {held / 1e6:.0f} MB in float32 ({held / 4e6:.0f}M parameters); peak resident MB:")
    for phase in ("before", *PHASES):
        click.echo(f"{phase:12}" + "".join(f"{rank[phase] / 1e6:10.0f}" for rank in ranks))
    missed = False
    for name, (figure, limit) in verdicts(ranks, held).items():
        missed |= figure > limit
        click.echo(f"{name}: {figure:.2f}, at most {limit}: {'ok' if figure <= limit else 'MISSED'}")
    if file:
        file.write_text(json.dumps({"weights": held, "ranks": ranks}))
    if strict and missed:
        raise SystemExit(1)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
