"""Two processes (gloo, CPU) do what one does: the same global batch, the same weights."""

from __future__ import annotations

import os
import subprocess
import sys

from safetensors.torch import load_file

FULL = "backbone.train={use='full'}"
PATHS = "stage.soar.objective.paths=3"
SAMPLER = "stage.soar.sampler={use='cps'}"
EPS = [f"stage.{name}.optimizer.eps=1e-3" for name in ("soar", "grpo")]
"""Adam divides by a gradient's size: rounding of a gradient near 0 must not become a step."""
SETTINGS = [word for key in (FULL, PATHS, SAMPLER, *EPS, "precision='fp32'") for word in ("--set", key)]


def test_two_processes_train_as_one_does(project):
    assert project.main("run", "pipeline.toml", "--set", "name='one'", *SETTINGS).status == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "corefit"]
    done = subprocess.run(
        [*command, "run", "pipeline.toml", "--set", "name='two'", *SETTINGS],
        cwd=project.folder,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for stage in ("01-soar", "02-grpo"):
        file = f"{stage}/model/transformer/diffusion_pytorch_model.safetensors"
        one, two = (load_file(project.folder / "runs" / name / file) for name in ("one", "two"))
        assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
