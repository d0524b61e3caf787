"""The exposure-bias meter where its answer is known, and its curve whatever number of ranks measures it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from torch import Tensor

from corefit.pipeline.eval import Drift, Eval
from corefit.run.evaluation.drift import Drifts, curve, examples, levels, measure
from corefit.run.evaluation.evaluator import Evaluator
from corefit.testing import ToyBackbone
from corefit.testing.toy import loaded
from corefit.types import Batch, Condition

GRID = torch.tensor([1.0, 0.75, 0.4, 0.1, 0.0])


def field_of(velocity: Any) -> Any:
    """A backbone with the velocity field `velocity(x, sigma)`."""
    return SimpleNamespace(
        guided=lambda x, sigma, cond, scale: velocity(x, sigma.reshape(-1, 1)), sigmas=lambda steps, shape: GRID
    )


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return torch.randn(3, 5, generator=drawn), torch.randn(3, 5, generator=drawn)


def drift(velocity: Any, pair: tuple[Tensor, Tensor], grid: Tensor = GRID) -> Tensor:
    return measure(field_of(velocity), *pair, Condition({}), grid, guidance=1.0)


def test_a_perfect_field_does_not_drift(pair):
    """The field of data that are one picture: it points from wherever x is away from x0."""
    x0, _ = pair
    assert drift(lambda x, sigma: (x - x0) / sigma, pair) == pytest.approx(torch.zeros(3, 4), abs=1e-5)


def test_a_constant_error_adds_up_to_its_path(pair):
    x0, noise = pair
    error = torch.tensor([[3.0, 0, 0, 0, -4.0]])  # a root mean square of 5 / sqrt(5)
    found = drift(lambda x, sigma: noise - x0 + error, pair)
    assert found == pytest.approx((5**0.5 * (1 - GRID[1:])).expand(3, 4), abs=1e-5)


def test_errors_feed_on_earlier_ones(pair):
    """dx = v dsigma with v = truth + c (x - ideal) multiplies the distance by 1 + c dsigma a step."""
    x0, noise = pair
    ideal = lambda sigma: (1 - sigma) * x0 + sigma * noise  # noqa: E731
    first = lambda sigma: (sigma == 1.0).float()  # noqa: E731
    found = drift(lambda x, sigma: noise - x0 + first(sigma) - 2 * (x - ideal(sigma)), pair)
    expected = 0.25 * torch.tensor([1, 1.7, 1.7 * 1.6, 1.7 * 1.6 * 1.2])
    assert found == pytest.approx(expected.expand(3, 4), abs=1e-5)


def test_the_trajectory_begins_where_it_is_told(pair):
    x0, noise = pair
    backbone = field_of(lambda x, sigma: noise - x0 + 1)
    for start, begins in ((1.0, 0), (0.8, 1), (0.75, 1), (0.05, 3)):
        grid = levels(backbone, 4, (5,), start)
        assert torch.equal(grid, GRID[begins:])
        found = measure(backbone, x0, noise, Condition({}), grid, guidance=1.0)
        assert found == pytest.approx((GRID[begins] - GRID[begins + 1 :]).expand(3, 4 - begins), abs=1e-5)


def test_examples_are_of_the_most_frequent_size_and_spread():
    data: Any = SimpleNamespace(buckets={0: np.array([0, 9]), 1: np.arange(1, 9)})
    assert examples(data, 4) == [1, 3, 5, 7]
    assert examples(data, 99) == [*range(1, 9)]


# The curve


def test_the_curve_is_the_mean_with_its_interval_and_the_paired_change():
    rng = np.random.default_rng(1)
    before = rng.normal(10, 3, (40, 2))
    after = before + rng.normal([-1, 0], 0.1, (40, 2))
    prompts = [f"p{n}" for n in range(40)]
    was = Drifts([0.5, 0.0], before.tolist(), prompts)
    made = curve(evolve(was, values=after.tolist()), was)
    assert made["drift"] == pytest.approx(after.mean(0))
    low, high = np.array(made["low"]), np.array(made["high"])
    assert ((low < after.mean(0) - 0.5) & (high > after.mean(0) + 0.5)).all()
    assert made["change"] == pytest.approx([-1, 0], abs=0.05)
    assert made["change_high"][0] < -0.9
    assert made["change_low"][1] < 0 < made["change_high"][1]
    assert curve(was).keys() == {"sigmas", "n", "drift", "low", "high"}


def test_the_curve_counts_repeated_prompts_once():
    values = np.repeat(np.random.default_rng(2).normal(size=(20, 1)), 5, 0).tolist()
    one, many = (curve(Drifts([0.0], values, [f"p{n // by}" for n in range(100)])) for by in (5, 1))
    assert one["high"][0] - one["low"][0] > 2 * (many["high"][0] - many["low"][0])


def test_what_does_not_vary_has_no_interval():
    assert curve(Drifts([0.0], [[0.0]] * 5, list("abcde")))["low"] == [None]


# Of a model


def gathered(parts: list[Any], part: Any) -> list[Any]:
    """Return the parts of the ranks so far, and this rank's for those that are to come; the last rank has all."""
    parts.append(part)
    return parts + [part] * 3


@pytest.mark.parametrize("world", [1, 2, 3])
def test_drift_is_of_the_examples_whatever_number_of_ranks(tmp_path, world: int):
    backbone = loaded(ToyBackbone((4, 4, 4)))
    x0 = torch.randn(9, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    parts: list[Any] = []

    def batch(rows: Any, turns: Any) -> Batch:
        texts = [f"prompt {row}" for row in rows]
        return Batch(x0[rows], backbone.encode_text(texts), texts, [{}] * len(rows), rows, backbone.shape)

    data: Any = SimpleNamespace(batch=batch, null=backbone.encode_text([""]), buckets={0: np.arange(9)})
    keys: Any = {"prompts": tmp_path / "p.txt", "steps": 3, "guidance": 2.0, "batch": 2}
    forwards, made = set[int](), dict[str, Any]()
    for rank in range(world):
        ranks: Any = SimpleNamespace(
            world=world,
            data_world=world,
            data_rank=rank,
            leads=True,
            forwards_together=True,
            layout=SimpleNamespace(context=1),
            device="cpu",
            all_gather_object=lambda part: gathered(parts, part),
        )
        before = backbone.calls
        of: Any = Evaluator(Eval(**keys, drift=Drift(samples=7, start=0.9)), data, ranks, data)
        made = of.drift(backbone)
        forwards.add(backbone.calls - before)
    assert len(forwards) == 1
    rows = [0, 1, 2, 3, 5, 6, 7]
    assert made["prompts"] == [f"prompt {row}" for row in rows]
    grid, alone = of._drift_of(backbone, data.batch(rows, rows), 0.9)
    assert made["sigmas"] == grid
    assert len(grid) == 2
    assert np.array(made["values"]) == pytest.approx(np.array(alone), rel=1e-5)
    assert np.array(alone).std(0).min() > 1e-3
