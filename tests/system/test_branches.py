"""Stages that branch, as one pipeline, on one process and on two."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import Project
from processes import metrics, settings, two, worst

STAGES = ("01-soar", "02-grpo", "03-sft", "04-late")
BRANCHES = """\
[[stage]]
name = "sft"
from = "base"
steps = 2
log_every = 1
batch = 4
train = { use = "full" }
objective = { use = "sft" }
optimizer = { lr = 1e-2, eps = 1e-3 }

[[stage]]
name = "late"
from = "soar"
steps = 2
log_every = 1
batch = 4
objective = { use = "sft" }
optimizer = { lr = 1e-2, eps = 1e-3 }

[eval]
"""
"""base -> {soar -> {grpo, late}, sft}; soar and sft train all weights, grpo and late a LoRA on those of soar."""


@pytest.mark.parametrize("keys", [(), pytest.param(("shard=true",), marks=pytest.mark.slow)], ids=["ddp", "fsdp"])
def test_two_processes_branch_as_one_does(project: Project, keys: tuple[str, ...]):
    project.swap(("[eval]\n", BRANCHES))
    full = ("stage.soar.train={use='full'}", *keys)
    done = two(project, "run", "pipeline.toml", *settings("name='two'", *full))
    assert done.status == 0, done.err
    assert project.main("run", "pipeline.toml", *settings("name='one'", *full)).status == 0
    one, other = (project.folder / "runs" / name for name in ("one", "two"))
    for stage in STAGES:
        assert worst(one / stage, other / stage) < 1e-5, stage
        assert np.allclose(metrics(one / stage), metrics(other / stage), atol=1e-4), stage
    rows = [json.loads((run / "results.json").read_text()) for run in (one, other)]
    starts = [{row["stage"]: row.get("start") for row in each} for each in rows]
    assert starts == [{"base": None, "soar": "base", "grpo": "soar", "sft": "base", "late": "soar"}] * 2
    for key in ("value", "gain", "base_gain"):
        assert np.allclose(*([row.get(key, 0.0) for row in each] for each in rows), atol=1e-5)
