"""What is advised where memory is short: keys, their order, and where they are of use."""

from __future__ import annotations

import pytest

from corefit.train import remedies


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
