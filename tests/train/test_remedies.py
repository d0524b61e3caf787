"""What is advised where memory is short: keys, their order, and where they are of use."""

from __future__ import annotations

import pytest

from corefit.pipeline.pipeline import Pipeline, read_unchecked
from corefit.train import remedies
from corefit.train.estimate import Device, estimates, show


@pytest.mark.parametrize(
    ("key", "cost"),
    [
        ("stage.train.optimizer.use", "its state is rounded to 8 bits"),
        ("stage.batch.micro_batch", "no result; small forwards are slower"),
        ("stage.shard.objective.of.copies.window", ""),
        ("stage.offload.train", "an adapter is trained in place of all weights"),
        ("shard", "weights are gathered from other devices"),
    ],
)
def test_what_a_key_costs_is_not_told_by_the_name_of_its_stage_or_objective(key, cost):
    remedy = remedies.Remedy(key, "1")
    assert remedy.cost == cost
    assert remedies.place(key) == ([*remedies.COSTS.values()].index(cost) if cost else 0)


@pytest.mark.parametrize("gpu", [True, False])
def test_on_a_cpu_nothing_is_to_move_to_main_memory(project, capsys, gpu):
    device = Device("a small device", 1e5, gpu=gpu)
    pipeline = read_unchecked(Pipeline, project.file, ["stage.soar.ema=0.9"])
    show(pipeline, estimates(pipeline, device, graphs=False), device)
    advice = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("soar: "))
    assert "backbone.gradient_checkpointing = true" in advice
    found = [key for key in ("offload =", "copies =", "text_encoders =") if key in advice]
    assert len(found) == (3 if gpu else 0), advice
