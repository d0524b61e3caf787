"""Scores are checked in one place: what a reward may give, and what is told of what it may not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attrs import frozen

from corefit import Reward
from corefit.errors import NonFinite, PluginError
from corefit.rng import Rng
from corefit.rollout.noise import LogitNormal
from corefit.samplers import Ode
from corefit.types import Batch, Condition, Weighted
from corefit.types.objective import Context
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


@frozen
class Bright(Reward):
    """How bright media are."""

    differentiable = True

    def score(self, media, prompts, meta):
        return media.flatten(1).mean(1)


class Doubles:
    """Decodes to twice the latents, as backbones of version 0.1 do."""

    def decode(self, x0):
        return 2 * x0


class Recomputes(Doubles):
    """Notes whether it is asked to recompute."""

    def __init__(self):
        self.asked = []

    def decode(self, x0, checkpoint=False):
        self.asked.append(checkpoint)
        return super().decode(x0)


def scored(backbone, x0, reward=None, micro_batch=2, gather=lambda x: x):
    entries = [Weighted("bright", reward or Bright(), 3.0), Weighted("again", Bright(), -1.0)]
    batch = Batch(None, Condition({}), PROMPTS, META, range(3), (3, 2, 2))
    ctx = Context(backbone, Ode(), LogitNormal(), Rng((0,), []), entries, micro_batch=micro_batch, gather=gather)
    return ctx.score(x0, batch)


@pytest.mark.parametrize("backbone", [Doubles(), Recomputes()], ids=["0.1", "today"])
def test_scores_have_a_graph_where_latents_have_one(backbone):
    x0 = torch.rand(3, 3, 2, 2).requires_grad_()
    scores = scored(backbone, x0)
    (slope,) = torch.autograd.grad(scores.total.sum(), x0)
    torch.testing.assert_close(slope, torch.full_like(slope, (3 - 1) * 2 / 12))
    torch.testing.assert_close(scores.total, 3 * scores.each["bright"] - scores.each["again"])
    with torch.no_grad():
        plain = scored(backbone, x0)
    torch.testing.assert_close(plain.total, scores.total.detach().double(), rtol=0, atol=1e-6)
    assert not plain.total.requires_grad
    assert getattr(backbone, "asked", [True, False, False]) == [True, False, False]


def test_a_reward_that_cuts_the_graph_is_named():
    cut = Gives(torch.zeros(3))
    with pytest.raises(PluginError, match=r"reward 'bright', Gives .*without a graph .*stay in torch"):
        scored(Doubles(), torch.rand(3, 3, 2, 2).requires_grad_(), cut)


def test_a_score_that_is_not_finite_on_another_rank_stops_this_one():
    with pytest.raises(NonFinite, match="a reward on another rank is not finite"):
        scored(Doubles(), torch.rand(3, 3, 2, 2), gather=lambda fine: torch.cat([fine, torch.zeros_like(fine)]))


@pytest.mark.parametrize("weight", [float("inf"), float("nan")])
def test_a_weight_is_a_number(weight):
    with pytest.raises(ValueError, match="'weight' must be a number"):
        Weighted("given", Gives(1), weight)
