"""check_noise, check_reward and check_source pass what is right, and name what is wrong."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from attrs import frozen

from corefit import Example, Reward
from corefit.data.sources import Jsonl
from corefit.plugins import Host
from corefit.rollout.noise import LogitNormal
from corefit.testing import ToyReward, check_noise, check_reward, check_source

# noise


@pytest.mark.parametrize("name", sorted(Host().offers["noise_weightings"]))
def test_corefits_own_weightings_pass(name):
    check_noise(Host().get("noise_weightings", name)())


class Normal(LogitNormal):
    """Right, to be spoiled."""


def spoiled(name: str, **methods: object) -> object:
    return frozen(type(name, (Normal,), methods))()


@pytest.mark.parametrize(
    ("noise", "says"),
    [
        (spoiled("Own", sample=lambda s, n, shift, rng: torch.rand(n) * 0.9 + 0.05), "draw from `rng` alone"),
        (spoiled("Time", sample=lambda s, n, shift, rng: 1000 * rng.rand(n).clamp(1e-3)), "they lie in"),
        (spoiled("Zero", sample=lambda s, n, shift, rng: rng.rand(n).round()), r"they lie in"),
        (spoiled("Wide", sample=lambda s, n, shift, rng: rng.rand(n).double()), "return float32"),
        (spoiled("One", sample=lambda s, n, shift, rng: rng.rand(n)[:1]), "one sigma a row"),
        (
            spoiled("Strata", sample=lambda s, n, shift, rng: ((torch.arange(n) + rng.rand(n)) / n).clamp(1e-3)),
            "which rows are drawn with it",
        ),
        (spoiled("Turned", sample=lambda s, n, shift, rng: Normal.sample(s, n, 1 / shift, rng)), "shift of 4 lowers"),
        (spoiled("Mean", weight=lambda s, sigma: sigma.mean()), "keep the shape"),
        (spoiled("Minus", weight=lambda s, sigma: 0.5 - sigma), "negative"),
        (spoiled("Pole", weight=lambda s, sigma: 1 / (sigma - sigma[0])), "not finite"),
    ],
    ids=lambda it: type(it).__name__ if not isinstance(it, str) else "",
)
def test_a_wrong_weighting_is_named(noise, says):
    with pytest.raises(AssertionError, match=f"^{type(noise).__name__}: .*{says}"):
        check_noise(noise)


# rewards


def test_a_right_reward_passes():
    check_reward(ToyReward())


@frozen
class OnDevice(Reward):
    """Reads prompts and metadata, on the media's device, and says so of its gradient."""

    differentiable = True

    def score(self, media, prompts, meta):
        tokens = torch.tensor([[len(word) for word in prompt.split()[:2]] for prompt in prompts]).to(media.device)
        wanted = torch.tensor([each.get("wanted", 0.5) for each in meta]).to(media.device)
        return -((media.mean((1, 2, 3)) - wanted) ** 2) * tokens.sum(1)


def test_a_reward_that_reads_prompts_and_metadata_passes():
    check_reward(OnDevice())
    check_reward(OnDevice(), meta=[{"wanted": 0.1}, {"wanted": 0.9}, {}])


def reward(name: str, score: object) -> object:
    return type(name, (), {"score": score})()


def changed(self, media, prompts, meta):
    media.clamp_(0.2)
    return media.mean((1, 2, 3))


def emptied(self, media, prompts, meta):
    for each in meta:
        each.setdefault("text", "")
    return media.mean((1, 2, 3))


def by_prompt(self, media, prompts, meta):
    """Rows that share a prompt get the last one's score."""
    scores = dict(zip(prompts, media.mean((1, 2, 3)), strict=True))
    return torch.stack([scores[prompt] for prompt in prompts])


def bright(media):
    return media.mean((1, 2, 3))


def differentiable(name: str, score: object) -> object:
    """A reward that says so."""
    return type(name, (), {"score": score, "differentiable": True})()


class Turned(torch.autograd.Function):
    """Brightness, whose gradient has its sign turned."""

    @staticmethod
    def forward(ctx, media):
        ctx.shape = media.shape
        return bright(media)

    @staticmethod
    def backward(ctx, slope):
        return -slope.reshape(-1, 1, 1, 1).expand(ctx.shape) / ctx.shape[1:].numel()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (reward("Ranked", lambda s, m, p, meta: (m.mean((1, 2, 3)) - m.mean()) * 5), "depend on other rows"),
        (reward("Noisy", lambda s, m, p, meta: m.mean((1, 2, 3)) + random.random()), "again"),
        (reward("Single", lambda s, m, p, meta: m.mean()), "one a row"),
        (reward("Failing", lambda s, m, p, meta: m.mean((1, 2, 3)) * float("nan")), "raise an exception"),
        (reward("Counting", lambda s, m, p, meta: torch.ones(len(m), dtype=torch.int64)), "return floats"),
        (reward("Changing", changed), "changes the media in place"),
        (reward("Emptied", emptied), "changes the metadata in place"),
        (reward("Shortened", lambda s, m, p, meta: bright(m) + 0 * len(p.pop())), "changes the prompts in place"),
        (reward("Nothing", lambda s, m, p, meta: None), "score gives NoneType, which is no tensor of numbers"),
        (reward("Words", lambda s, m, p, meta: ["good"] * len(p)), "score gives list, which is no tensor of numbers"),
        (reward("Complex", lambda s, m, p, meta: torch.fft.fft(bright(m))), "score gives torch.complex64"),
        (reward("Column", lambda s, m, p, meta: bright(m)[:, None]), r"score of 3 media is \[3, 1\]; return one a row"),
        (reward("Sorted", lambda s, m, p, meta: bright(m).sort().values), "in another order get each other's scores"),
        (reward("OnePrompt", lambda s, m, p, meta: bright(m) + len(p[0])), "each row's own prompt"),
        (reward("ByPrompt", by_prompt), "row 0 scores .* alone and .* among others"),
        (differentiable("Detached", lambda s, m, p, meta: bright(m.detach())), "its scores have no graph"),
        (differentiable("Judged", torch.no_grad()(lambda s, m, p, meta: bright(m))), "its scores have no graph"),
        (differentiable("Rounded", lambda s, m, p, meta: bright((9 * m).round())), "its gradient is 0 in all media"),
        (differentiable("Rooted", lambda s, m, p, meta: bright((m - m).sqrt())), "its gradient is NaN"),
        (differentiable("Reversed", lambda s, m, p, meta: Turned.apply(m)), "the sign of the gradient is wrong"),
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
