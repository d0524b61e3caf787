"""check_noise, check_reward and check_source pass what is right, and name what is wrong."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from attrs import frozen

from corefit import Example
from corefit.noise import LogitNormal
from corefit.plugins import Host
from corefit.sources import Jsonl
from corefit.testing import ToyReward, check_noise, check_reward, check_source

# noise


@pytest.mark.parametrize("name", sorted(Host().offers["noise_weightings"]))
def test_corefits_own_weightings_pass(name):
    check_noise(Host().get("noise_weightings", name)())


class Normal(LogitNormal):
    """Right, to be spoilt."""


def spoilt(name: str, **methods: object) -> object:
    return frozen(type(name, (Normal,), methods))()


@pytest.mark.parametrize(
    ("noise", "says"),
    [
        (spoilt("Own", sample=lambda s, n, shift, rng: torch.rand(n) * 0.9 + 0.05), "draw from `rng` alone"),
        (spoilt("Time", sample=lambda s, n, shift, rng: 1000 * rng.rand(n).clamp(1e-3)), "they lie in"),
        (spoilt("Zero", sample=lambda s, n, shift, rng: rng.rand(n).round()), r"they lie in"),
        (spoilt("Wide", sample=lambda s, n, shift, rng: rng.rand(n).double()), "return float32"),
        (spoilt("One", sample=lambda s, n, shift, rng: rng.rand(n)[:1]), "one sigma a row"),
        (
            spoilt("Strata", sample=lambda s, n, shift, rng: ((torch.arange(n) + rng.rand(n)) / n).clamp(1e-3)),
            "which rows are drawn with it",
        ),
        (spoilt("Turned", sample=lambda s, n, shift, rng: Normal.sample(s, n, 1 / shift, rng)), "shift of 4 lowers"),
        (spoilt("Mean", weight=lambda s, sigma: sigma.mean()), "keep the shape"),
        (spoilt("Minus", weight=lambda s, sigma: 0.5 - sigma), "negative"),
        (spoilt("Pole", weight=lambda s, sigma: 1 / (sigma - sigma[0])), "not finite"),
    ],
    ids=lambda it: type(it).__name__ if not isinstance(it, str) else "",
)
def test_a_wrong_weighting_is_named(noise, says):
    with pytest.raises(AssertionError, match=f"^{type(noise).__name__}: .*{says}"):
        check_noise(noise)


# rewards


def test_a_right_reward_passes():
    check_reward(ToyReward())


def reward(name: str, score: object) -> object:
    return type(name, (), {"score": score})()


def changed(self, media, prompts, meta):
    media.clamp_(0.2)
    return media.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (reward("Ranked", lambda s, m, p, meta: (m.mean((1, 2, 3)) - m.mean()) * 5), "depend on its neighbours"),
        (reward("Noisy", lambda s, m, p, meta: m.mean((1, 2, 3)) + random.random()), "again"),
        (reward("Single", lambda s, m, p, meta: m.mean()), "one a row"),
        (reward("Failing", lambda s, m, p, meta: m.mean((1, 2, 3)) * float("nan")), "raise an exception"),
        (reward("Counting", lambda s, m, p, meta: torch.ones(len(m), dtype=torch.int64)), "return floats"),
        (reward("Changing", changed), "in place"),
    ],
    ids=lambda it: type(it).__name__ if not isinstance(it, str) else "",
)
def test_a_wrong_reward_is_named(wrong, says):
    with pytest.raises(AssertionError, match=f"^{type(wrong).__name__}: .*{says}"):
        check_reward(wrong)


# sources


def test_a_right_source_passes(pictures):
    check_source(Jsonl(pictures / "train.jsonl"))
    check_source(Jsonl(pictures / "heldout.jsonl"))


def source(name: str, *examples: Example) -> object:
    return type(name, (), {"examples": lambda self: iter(examples)})()


class Shuffled:
    turns = itertools.count()

    def examples(self) -> Iterator[Example]:
        turn = next(self.turns)
        return iter([Example(str((n + turn) % 5)) for n in range(5)])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (source("Empty"), "gives nothing"),
        (Shuffled(), "another order"),
        (source("Half", Example("a", Path(__file__)), Example("b")), "all of them media, or none"),
        (source("Gone", Example("a", Path("/nowhere/a.png"))), "does not exist"),
        (source("Odd", Example("a", meta={"x": {1}})), "not JSON"),
        (source("Number", Example((1,))), "one string or several"),  # type: ignore[arg-type]
    ],
    ids=lambda it: type(it).__name__ if not isinstance(it, str) else "",
)
def test_a_wrong_source_is_named(wrong, says):
    with pytest.raises(AssertionError, match=f"^{type(wrong).__name__}: .*{says}"):
        check_source(wrong)
