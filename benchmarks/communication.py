"""Bytes that two processes exchange in a step: SOAR, GRPO and SFT, sharded (FSDP2), kept gathered or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from attrs import define

from benchmarks import sharding
from corefit.pipeline import read
from corefit.run.run import run
from corefit.train.loop import Loop

MOST = 1.1
"""A SOAR step's bytes at most, in those of an SFT step."""
LAYERS, QUICK = 12, 3
STAGES = """
[[stage]]
name = "sft"
steps = 2
batch = 4
objective = { use = "sft" }

[[stage]]
name = "soar"
steps = 2
batch = 4
objective = { use = "soar", points = 6 }

[[stage]]
name = "grpo"
steps = 2
batch = 4
objective = { use = "flow_grpo", group = 2, steps = 4, beta = 0.1 }
sampler = { use = "flow_sde" }
reward = [{ use = "bright" }]
"""
MODES = {"full": "{ use = 'full' }", "lora": "{ use = 'lora', rank = 4 }"}
GATHERED = ("allgather", "all_gather")
REDUCED = ("reduce_scatter", "allreduce", "all_reduce")


@define
class Exchanged:
    """Bytes of the results of gathering, and of what was put into reductions, on this process."""

    gathered: int = 0
    reduced: int = 0

    def add(self, name: str, args: Any, result: Any) -> None:
        """Count one operation of torch.distributed, by its name."""
        if any(word in name for word in GATHERED):
            self.gathered += _bytes(args[0] if name.endswith("_") else result)
        elif any(word in name for word in REDUCED):
            self.reduced += _bytes(args[1] if name.startswith("_reduce_scatter") else args[0])


def _bytes(tensors: Any) -> int:
    import torch
    from torch.utils._pytree import tree_leaves

    return sum(t.nbytes for t in tree_leaves(tensors) if isinstance(t, torch.Tensor))


@contextmanager
def counted() -> Generator[Exchanged]:
    """Count what this process exchanges within, whoever asks for it: FSDP2, DDP, DTensor or corefit itself."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found = Exchanged()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func.namespace in ("c10d", "_c10d_functional"):
                found.add(func.__name__.partition(".")[0], args, result)
            return result

    with Count():
        yield found


def worker(folder: Path, variants: Mapping[str, list[str]]) -> None:
    """Run the pipeline in `folder` with each variant's settings, as one of its processes, and write what was counted.

    The last step of each stage counts: in the first one, things are made that stay.
    """
    import torch

    torch.set_num_threads(1)
    counts: dict[str, dict[str, Any]] = {}
    take_step = Loop.take_step
    for name, settings in variants.items():
        counts[name] = {}

        def watched(loop: Loop, batch: Any, stages: dict[str, Any] = counts[name]) -> None:
            with counted() as found:
                take_step(loop, batch)
            weights = sum(p.numel() * p.element_size() for p in loop.state.transformer.parameters())
            trained = sum(p.numel() * 4 for p in loop.state.trainable.values())
            stages[loop.job.stage.name] = {
                "gathered": found.gathered,
                "reduced": found.reduced,
                "weights": weights,
                "trained": trained,
                "kept": loop.sharding.kept,
            }

        Loop.take_step = watched
        run(read(folder / "pipeline.toml", [f"name='{name}'", *settings]))
    Loop.take_step = take_step
    (folder / f"exchanged-{os.environ['RANK']}.json").write_text(json.dumps(counts))


def project(folder: Path, layers: int) -> None:
    """Write a project with a stage of each kind, and a network of so many layers."""
    from PIL import Image

    from corefit.testing import tiny_sd3

    tiny_sd3(folder / "base", words=("a", "red", "sky"), layers=layers, heads=2, head_width=32)
    for number in range(4):
        Image.new("RGB", (16, 16), (60 * number, 90, 30)).save(folder / f"{number}.png")
    lines = (json.dumps({"media": f"{n}.png", "prompt": "a red sky"}) for n in range(4))
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "bright.py").write_text(sharding.BRIGHT)
    (folder / "pipeline.toml").write_text(sharding.PIPELINE.partition("[[stage]]")[0] + STAGES)


def variants() -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the settings of each run."""
    for mode, value in MODES.items():
        for gather in ("term", "step"):
            yield f"{mode}-{gather}", [f"backbone.train={value}", f"gather='{gather}'"]


@click.command()
@click.option("--quick", is_flag=True, help="A small network: the ratios are the same.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the figures there as well.")
@click.option("--assert", "strict", is_flag=True, help="Exit status 1 where a limit is passed.")
def communication(quick: bool, file: Path | None, strict: bool) -> None:
    """Bytes that a step of SFT, SOAR and GRPO gathers and reduces on two processes that share a network (1 minute)."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        project(folder, QUICK if quick else LAYERS)
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
        told = json.dumps(dict(variants()))
        command = [sys.executable, *launcher, "-m", "benchmarks.communication", str(folder), told]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1], env={**os.environ, "OMP_NUM_THREADS": "1"})
        found = json.loads((folder / "exchanged-0.json").read_text())
    click.echo("\nbytes of a step on each process, in MB, and in those of the SFT step of the same run:")
    click.echo(f"{'':12}{'stage':8}{'gathered':>10}{'reduced':>10}{'ratio':>8}")
    missed = False
    for variant, stages in found.items():
        for stage, each in stages.items():
            ratio = total(each) / total(stages["sft"])
            limit = MOST if variant.endswith("step") and stage == "soar" else None
            verdict = "" if limit is None else f"  at most {limit}: {'ok' if ratio <= limit else 'MISSED'}"
            missed |= limit is not None and ratio > limit
            sizes = f"{each['gathered'] / 1e6:10.2f}{each['reduced'] / 1e6:10.2f}"
            click.echo(f"{variant:12}{stage:8}{sizes}{ratio:8.2f}{verdict}")
    if file:
        file.write_text(json.dumps({"benchmark": "communication", "quick": quick, "variants": found}, indent=2) + "\n")
    if strict and missed:
        raise SystemExit(1)


def total(step: Mapping[str, Any]) -> int:
    """Return all bytes of a step."""
    return step["gathered"] + step["reduced"]


if __name__ == "__main__":
    worker(Path(sys.argv[1]), json.loads(sys.argv[2]))
