"""Scores are checked in one place: what a reward may give, and what is told of what it may not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attrs import frozen

from corefit import Reward
from corefit.errors import NonFinite, PluginError
from corefit.types import Weighted
from corefit.types.rewards import refuse_non_finite, score

MEDIA, PROMPTS, META = torch.zeros(3, 3, 4, 4), ["a", "b", "c"], [{}, {}, {}]


@frozen
class Gives(Reward):
    """What it was made with."""

    value: object

    def score(self, media, prompts, meta):
        return self.value


@pytest.mark.parametrize(
    "value",
    [[1, 2, 3], np.array([1, 2, 3]), torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0, 3.0], requires_grad=True)],
    ids=["list", "numpy", "integers", "gradient"],
)
def test_any_real_numbers_are_scores(value):
    scores = score(Weighted("given", Gives(value)), MEDIA, PROMPTS, META)
    assert scores.tolist() == [1.0, 2.0, 3.0]
    assert (scores.dtype, scores.requires_grad) == (torch.float64, False)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "None"),
        ("high", "'high'"),
        (["a", "b", "c"], r"\['a', 'b', 'c'\]"),
        ({"x": 1}, r"{'x': 1}"),
        ([1, None, 3], r"\[1, None, 3\]"),
        ([1, 10**400, 3], r"\[1, 10+\.\.\."),
        (torch.ones(3, dtype=torch.complex64), r"complex64 \[3\]"),
        (torch.ones(3, device="meta"), r"meta \[3\]"),
        (torch.ones(3).to_sparse(), r"sparse_coo \[3\]"),
        (1.0, r"float32 \[\]"),
        (torch.ones(2), r"float32 \[2\]"),
        (torch.ones(3, 1), r"float32 \[3, 1\]"),
    ],
)
def test_anything_else_names_the_reward_and_its_file(value, found):
    with pytest.raises(PluginError, match=rf"reward 'given', Gives \(.*test_rewards.py\): score\(\) gave {found}"):
        score(Weighted("given", Gives(value)), MEDIA, PROMPTS, META)


def test_what_is_not_finite_is_told_with_its_samples():
    scores = {"one": torch.ones(3), "two": torch.tensor([1.0, float("nan"), float("inf")])}
    with pytest.raises(NonFinite, match=r"reward 'two' is not finite for \['b', 'c'\]"):
        refuse_non_finite(scores, PROMPTS)
    refuse_non_finite({"one": torch.ones(3)}, PROMPTS)
    refuse_non_finite({}, [])


def test_all_ranks_hear_of_one_that_is_not_finite():
    with pytest.raises(NonFinite, match="a reward on another rank is not finite"):
        refuse_non_finite({"one": torch.ones(3)}, PROMPTS, lambda fine: torch.cat([fine, torch.tensor([False])]))


@pytest.mark.parametrize("weight", [float("inf"), float("nan")])
def test_a_weight_is_a_number(weight):
    with pytest.raises(ValueError, match="'weight' must be a number"):
        Weighted("given", Gives(1), weight)
