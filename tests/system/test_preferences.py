"""SOAR, DPO on given pairs, DPO on pairs of rollouts and Flow-GRPO as one pipeline, on one process and on two."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Project
from PIL import Image
from processes import metrics, settings, two, worst

STAGES = ("01-soar", "02-dpo", "03-online", "04-grpo")
DPO = """
[[stage]]
name = "dpo"
steps = 3
log_every = 1
batch = 4
micro_batch = 2
objective = { use = "dpo", beta = 20.0, sft = 1.0, dropout = 0.5 }
optimizer = { lr = 1e-2, eps = 1e-3 }

[[stage]]
name = "online"
steps = 3
log_every = 1
batch = 8
reward = [{ use = "bright" }]
optimizer = { lr = 1e-2, eps = 1e-3 }

[stage.objective]
use = "sum"
of = [
  { use = "online_dpo", group = 2, steps = 3, guidance = 2.0, draws = 2, epochs = 2, beta = 20.0, reference_every = 2 },
  { use = "soar", points = 1, weight = 0.5 },
]

[[stage]]
name = "grpo"
"""
"""Stages between SOAR and Flow-GRPO."""


@pytest.fixture
def preferences(project: Project) -> Project:
    """Pictures with a rejected one each, which is noise of another size."""
    media = project.own("media")
    for number in range(8):
        noise = np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(noise).save(media / f"{number}-worse.png")
    lines = [
        {"prompt": f"a picture of a {colour} sky", "media": f"media/{n}.png", "worse": f"media/{n}-worse.png"}
        for n, colour in enumerate(("red", "green", "blue") * 3)
        if n < 8
    ]
    (project.folder / "train.jsonl").unlink()
    project.lines("train.jsonl", *lines)
    project.swap(
        ('path = "train.jsonl"', 'path = "train.jsonl", extra = { rejected = "worse" }'),
        ('\n[[stage]]\nname = "grpo"\n', DPO),
    )
    return project


def margins(stage: Path) -> list[float]:
    """The mean margin of each logged step."""
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [value for line in lines for name, value in line.items() if name.endswith("margin")]


@pytest.mark.parametrize(
    "keys",
    [pytest.param(("shard=true",), marks=pytest.mark.slow), ("backbone.train={use='full'}",)],
    ids=["fsdp lora", "ddp full"],
)
def test_two_processes_train_as_one_does(preferences, keys):
    done = two(preferences, "run", "pipeline.toml", *settings("name='two'", *keys))
    assert done.status == 0, done.err
    assert preferences.main("run", "pipeline.toml", *settings("name='one'", *keys)).status == 0
    one, other = (preferences.folder / "runs" / name for name in ("one", "two"))
    for stage in STAGES:
        assert worst(one / stage, other / stage) < 1e-5, stage
        assert np.allclose(metrics(one / stage), metrics(other / stage), atol=1e-4), stage
    first, *later = margins(one / STAGES[1])
    assert first == 0, "the reference is the model that the stage starts from"
    assert all(later)
