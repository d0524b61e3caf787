"""Runs in several processes, and what two runs left, compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from conftest import Ended, Project
from safetensors.torch import load_file

EPS = tuple(f"stage.{name}.optimizer.eps=1e-3" for name in ("soar", "grpo"))
"""Adam divides by a gradient's size: rounding of a gradient near 0 must not become a step."""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def settings(*keys: str) -> list[str]:
    return [word for key in ("precision='fp32'", *EPS, *keys) for word in ("--set", key)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def processes(project: Project, *args: str, launcher: Sequence[str], **more: str) -> Ended:
    """`corefit ...` by a launcher."""
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "corefit", *args],
        cwd=project.folder,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=200,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def two(project: Project, *args: str) -> Ended:
    """`corefit ...` in two processes."""
    return processes(project, *args, launcher=TORCHRUN)


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
