"""Diversity: the Vendi score of known cases, and samples of their own prompts whatever number of ranks shares them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor

from corefit.errors import PluginError
from corefit.pipeline.eval import Diversity, Eval
from corefit.rng import Rng
from corefit.rollout import generate
from corefit.run.evaluation import diversity
from corefit.run.evaluation.diversity import distance, features, measure, spread, vendi
from corefit.run.evaluation.evaluator import Evaluator
from corefit.testing import ToyBackbone
from corefit.testing.toy import loaded
from corefit.types import Batch, Reward, Weighted


class Means(Reward):
    """A reward whose features are the channels' means."""

    def score(self, media: Tensor, prompts: Any, meta: Any) -> Tensor:
        return media.mean((1, 2, 3))

    def features(self, media: Tensor) -> Tensor:
        return media.flatten(2).mean(2)


# Scores


def blocks(*sizes: int) -> np.ndarray:
    """Return the similarity of groups of so many equal samples that have nothing in common."""
    label = np.repeat(np.arange(len(sizes)), sizes)
    return (label[:, None] == label).astype(float)


@pytest.mark.parametrize(
    ("similarity", "score"),
    [
        (np.eye(7), 7),
        (np.ones((7, 7)), 1),
        (blocks(3, 3), 2),
        (blocks(2, 2, 2, 2), 4),
        (blocks(9, 1), np.exp(-(0.9 * np.log(0.9) + 0.1 * np.log(0.1)))),
        (np.array([[1, 0.9], [0.9, 1]]), np.exp(-(0.95 * np.log(0.95) + 0.05 * np.log(0.05)))),
    ],
)
def test_the_vendi_score_counts_what_differs(similarity: np.ndarray, score: float):
    """The exponential of the entropy of the shares, where samples are equal or have nothing in common."""
    assert vendi(similarity) == pytest.approx(score)


def test_distance_is_the_mean_over_pairs():
    assert distance(np.eye(5)) == 1
    assert distance(np.ones((5, 5))) == 0
    assert distance(blocks(2, 1)) == pytest.approx(2 / 3)


def test_only_the_direction_of_features_matters():
    samples = np.random.default_rng(0).normal(size=(6, 20))
    scaled = measure(samples * np.arange(1, 7)[:, None])
    assert scaled == pytest.approx(measure(samples))
    assert 1 < scaled["vendi"] < 6
    assert measure(np.repeat(samples[:1], 6, 0)) == pytest.approx({"vendi": 1, "distance": 0})


def test_black_pictures_are_like_each_other_and_like_nothing_else():
    assert measure(np.zeros((4, 9))) == pytest.approx({"vendi": 1, "distance": 0})
    assert measure(np.array([[0.0, 0], [0, 0], [1, 1], [1, 1]]))["vendi"] == pytest.approx(2)


# What is compared


def test_prompts_are_distinct_and_spread():
    assert spread(["a", "a", "b", "c", "b", "d"], 2) == [0, 3]
    assert spread(["a", "a", "b"], 16) == [0, 2]
    assert spread([f"{n}" for n in range(100)], 4) == [0, 25, 50, 75]


@pytest.mark.parametrize(("shape", "size"), [((3, 64, 32), 3 * 16 * 16), ((3, 8, 8), 192), ((3, 9, 32, 32), 3072)])
def test_pixels_are_downscaled(shape: tuple[int, ...], size: int):
    media = torch.rand(2, *shape)
    found = features(media, None)
    assert found.shape == (2, size)
    assert found.mean() == pytest.approx(float(media.mean()), abs=1e-3 if len(shape) == 3 else 0.02)


@pytest.mark.parametrize("wrong", [torch.ones(2), torch.ones(3, 4), torch.full((2, 4), torch.nan)])
def test_wrong_features_are_blamed_on_the_reward(wrong: Tensor):
    source: Any = SimpleNamespace(features=lambda media: wrong)
    with pytest.raises(PluginError, match=r"features\(\) gave .* for 2 samples"):
        features(torch.rand(2, 3, 8, 8), source)


def test_features_of_an_unknown_reward_are_refused(tmp_path):
    keys: Any = {"prompts": tmp_path / "p.txt", "diversity": Diversity(features="means")}
    with pytest.raises(ValueError, match=r"'diversity.features' is 'means'.*it may be 'pixels'"):
        Eval(**keys)
    made = Eval(**keys, reward=(Weighted("means", Means()),))
    assert isinstance(made.featured, Means)
    assert attrs.evolve(made, diversity=Diversity()).featured is None


# Of a model


def gathered(parts: list[Any], part: Any) -> list[Any]:
    """Return the parts of the ranks so far; the last rank has all."""
    parts.append(part)
    return parts


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("named", ["pixels", "means"])
def test_every_prompt_has_samples_of_its_own_noise(tmp_path, world: int, named: str):
    """As computed one by one; with sharded weights every rank takes part in as many forwards."""
    backbone, prompts = loaded(ToyBackbone((4, 4, 4))), ["a", "b", "a", "c", "d", "e"]
    parts: list[Any] = []
    forwards: list[int] = []

    class Prompts:
        null = backbone.encode_text([""])

        def __len__(self) -> int:
            return len(prompts)

        def batch(self, rows: Any, turns: Any) -> Batch:
            texts = [prompts[row] for row in rows]
            return Batch(None, backbone.encode_text(texts), texts, [{}] * len(rows), rows, backbone.shape)

    eval = Eval(
        prompts=tmp_path / "p.txt",
        reward=(Weighted("means", Means()),),
        diversity=Diversity(prompts=4, samples=3, features=named),
        steps=2,
        guidance=2.0,
        batch=2,
        seed=5,
    )
    made: dict[str, Any] = {}
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
        dataset: Any = Prompts()
        made = Evaluator(eval, dataset, ranks).diversity(backbone, prompts)
        forwards.append(backbone.calls - before)
    assert made["rows"] == [0, 1, 3, 4]
    assert len(set(forwards)) == 1
    for place, row in enumerate(made["rows"]):
        noise = torch.cat([Rng((5, "diversity", draw), [row]).randn((1, *backbone.shape)) for draw in range(3)])
        with torch.no_grad():
            x0 = generate(backbone, noise, backbone.encode_text([prompts[row]] * 3), steps=2, guidance=2.0)
            found = measure(features(backbone.decode(x0), eval.featured))
        assert {name: made["values"][name][place] for name in diversity.METRICS} == pytest.approx(found)
        assert found["vendi"] > 1.0001
