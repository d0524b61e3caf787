"""Runs in two processes, and what two runs left, compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import forks
import numpy as np
import torch
from conftest import Ended, Project
from forks import Forked
from safetensors.torch import load_file

EPS = tuple(f"stage.{name}.optimizer.eps=1e-3" for name in ("soar", "grpo"))
"""Adam divides by a gradient's size: rounding of a gradient near 0 must not become a step."""
FULL = ("backbone.train={use='full'}", "stage.soar.ema=0.9", "stage.soar.micro_batch=1")
GRPO = (
    "stage.grpo.objective={use='flow_grpo', group=2, steps=4, beta=50.0, updates=2}",
    "stage.grpo.batch=8",
    "stage.grpo.steps=3",
    "stage.grpo.optimizer.lr=1e-2",
)
"""With a KL that is felt: a reference that is not the policy as the stage found it must show."""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def settings(*keys: str) -> list[str]:
    return [word for key in ("precision='fp32'", *EPS, *keys) for word in ("--set", key)]


def by_torchrun(project: Project, *args: str) -> Ended:
    """`corefit ...` in two processes as torchrun starts them: each with imports and hashes of its own."""
    done = subprocess.run(
        [sys.executable, *TORCHRUN, "-m", "corefit", *args],
        cwd=project.folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def ended(*started: Forked) -> Ended:
    """The first status that is not 0 of processes that run together, and what they said, one after the other."""
    out, err = zip(*(process.communicate(timeout=300) for process in started), strict=True)
    return Ended(next(filter(None, (process.wait() for process in started)), 0), "".join(out), "".join(err))


def two(project: Project, *args: str, number: int = 2, **environment: str) -> Ended:
    """`corefit ...` in two processes, or another number of them."""
    return ended(*forks.ranks(*[("-m", "corefit", *args)] * number, cwd=project.folder, **environment))


def weights(stage: Path) -> Mapping[str, torch.Tensor]:
    """What a stage left."""
    files = [*stage.glob("model/transformer/*.safetensors"), *stage.glob("model/*.safetensors")]
    return {name: t for file in files for name, t in load_file(file).items()}


def metrics(stage: Path) -> list[float]:
    """Logged numbers by line and name, but for those of the clock."""
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [line[k] for line in lines for k in sorted(line) if not k.startswith(("seconds", "samples_per"))]


def worst(a: Path, b: Path) -> float:
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    assert one
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def as_one(project: Project, keys: Sequence[str], done: Ended) -> None:
    """What run `two` left is what one process leaves."""
    assert done.status == 0, done.err
    assert project.main("run", "pipeline.toml", *settings("name='one'", *keys)).status == 0
    one, other = (project.folder / "runs" / name for name in ("one", "two"))
    for stage in ("01-soar", "02-grpo"):
        assert worst(one / stage, other / stage) < 1e-5
        assert np.allclose(metrics(one / stage), metrics(other / stage), atol=1e-4)
