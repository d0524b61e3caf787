"""`geneval` as a whole: with a detector of random weights, and with one that finds what the test says."""

from __future__ import annotations

import shutil

import pytest
import torch
from detectors import tiny_color_clip, tiny_mask2former, tiny_yolos
from published import pictures

from corefit.errors import ConfigError, DataError, ModelError
from corefit.testing import check_reward
from corefit.types import KeyedReward, SizedReward
from corefit_rewards import geneval
from corefit_rewards.geneval import Geneval
from corefit_rewards.geneval_rules import Found

PROMPTS = ["a photo of a dog", "a photo of a cat", "a photo of a red dog and a mouse"]
META = [
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}]},
    {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]},
    {
        "tag": "x",
        "include": [{"class": "dog", "count": 1, "color": "red"}, {"class": "computer mouse", "count": 1}],
    },
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("geneval")
    tiny_mask2former(made / "masks")
    tiny_yolos(made / "boxes")
    tiny_color_clip(made / "clip")
    return made


@pytest.fixture
def made(folder):
    """Make a reward over one of the tiny detectors."""
    return lambda kind, **keys: Geneval(detector=str(folder / kind), clip=str(folder / "clip"), **keys)


@pytest.mark.parametrize("kind", ["masks", "boxes"])
def test_keeps_the_rules_of_rewards(made, kind):
    reward = made(kind, rule="share", threshold=0.1, counting_threshold=0.2, batch=2)
    reward.check()
    check_reward(reward, pictures(48, 40), PROMPTS, META)


RULES = ("correct", "strict", "share")


@pytest.fixture
def finds(monkeypatch, made):
    """Let the detector find given objects, and CLIP see every dog red and all else blue."""

    def replaced(*objects):
        class Detector:
            def find(self, pictures, threshold):
                assert pictures.dtype == torch.uint8
                assert threshold == 0.3
                return [one for one, _ in zip(objects, pictures, strict=False)]

        class Judge:
            def colors(self, picture, name, found):
                return ["red" if name == "dog" else "blue"] * len(found)

        monkeypatch.setattr(geneval, "read_detector", lambda path, place: Detector())
        monkeypatch.setattr(geneval, "read_clip", lambda path, place: Judge())
        return lambda **keys: made("boxes", **keys)

    return replaced


def at(x, score):
    return Found((x, 0.0, x + 10, 10.0), score)


def test_scores_differ_by_rule(finds):
    reward = finds({"dog": [at(0, 0.95), at(20, 0.9)]}, {}, {"dog": [at(0, 0.8)]})
    found = {rule: reward(rule=rule).score(pictures(48, 40), PROMPTS, META).tolist() for rule in RULES}
    assert set(found["correct"] + found["strict"]) <= {0.0, 1.0}
    assert all(0 <= part <= 1 for part in found["share"])
    assert len({tuple(each) for each in found.values()}) == 3


def test_objects_become_scores(finds):
    three_cats = [at(0, 0.95), at(20, 0.92), at(40, 0.6)]
    reward = finds({"dog": [at(0, 0.31)]}, {"cat": three_cats}, {"dog": [at(0, 0.8)], "computer mouse": [at(20, 0.7)]})
    assert reward().score(pictures(48, 40), PROMPTS, META).tolist() == [1, 1, 1]  # counting: the third cat is uncertain
    lower = reward(counting_threshold=0.5, rule="strict").score(pictures(48, 40), PROMPTS, META)
    assert lower.tolist() == [1, 0, 1]
    share = reward(counting_threshold=0.5, rule="share").score(pictures(48, 40), PROMPTS, META)
    assert share.tolist() == [1, 0.5, 1]


def test_a_color_and_a_position(finds):
    meta = [
        {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "blue"}]},
        {
            "tag": "position",
            "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["right of", 0]}],
        },
    ]
    reward = finds({"dog": [at(0, 0.9)]}, {"dog": [at(0, 0.9)], "cat": [at(15, 0.9)]})
    media = pictures(48, 40)[:2]
    assert reward().score(media, PROMPTS[:2], meta).tolist() == [0, 1]
    assert reward(position_threshold=0.5).score(media, PROMPTS[:2], meta).tolist() == [0, 0]


def test_the_number_of_objects_is_bounded(finds):
    many = {"cat": [at(20 * n, 0.95) for n in range(5)]}
    meta = [{"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]}]
    reward, media = finds(many), pictures(48, 40)[:1]
    assert reward().score(media, PROMPTS[:1], meta).tolist() == [0]
    assert reward(max_objects=2).score(media, PROMPTS[:1], meta).tolist() == [1]
    same = finds({"cat": [at(0, 0.95), at(1, 0.94), at(20, 0.93)]})
    assert same(overlap=0.5).score(media, PROMPTS[:1], meta).tolist() == [1]


def test_a_class_that_the_detector_does_not_know_is_refused(made):
    meta = [{"tag": "single_object", "include": [{"class": "zebra", "count": 1}]}]
    with pytest.raises(DataError, match="'a photo of a zebra' ask for the class 'zebra', which the detector does not"):
        made("boxes").score(pictures(48, 40)[:1], ["a photo of a zebra"], meta)


def test_what_is_not_finite_is_not_looked_at(made):
    media = pictures(48, 40)
    media[1, 0, 0, 0] = torch.inf
    scores = made("boxes").score(media, PROMPTS, META)
    assert scores.isnan().tolist() == [False, True, False]


def test_memory_is_known_without_weights(made):
    reward = made("masks")
    assert isinstance(reward, SizedReward)
    assert {p.device.type for p in reward.load_blank().parameters()} == {"meta"}
    assert made("masks", device="cpu").load_blank() is None


def test_other_weights_are_another_reward(made, folder):
    """Equal files in another folder are the same one."""
    copied = folder / "copied"
    shutil.copytree(folder / "boxes", copied)
    reward = Geneval(detector=str(copied), clip=str(folder / "clip"))
    assert isinstance(reward, KeyedReward)
    assert reward.scores_key() == made("boxes").scores_key() != made("masks").scores_key()
    with (copied / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\x77")
    assert reward.scores_key() != made("boxes").scores_key()
    assert Geneval().scores_key() != Geneval(clip="openai/clip-vit-base-patch32").scores_key()


def test_a_device_that_is_not_there_is_said(made):
    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    with pytest.raises(ConfigError, match='device = "cuda": this machine has no such device'):
        made("boxes", device="cuda").score(pictures(48, 40), PROMPTS, META)


def test_missing_folders_are_refused(made, tmp_path):
    with pytest.raises(ModelError, match="detector = "):
        Geneval(detector=str(tmp_path / "no")).check()
    with pytest.raises(ModelError, match="clip = "):
        Geneval(detector=made("boxes").detector, clip=str(tmp_path / "no")).check()


@pytest.mark.parametrize(
    "keys",
    [
        {"threshold": 1.5},
        {"counting_threshold": -1.0},
        {"overlap": 2.0},
        {"max_objects": 0},
        {"device": "gpu"},
        {"batch": 0},
    ],
)
def test_keys_have_bounds(keys):
    with pytest.raises(ValueError, match=next(iter(keys))):
        Geneval(**keys)


def test_published_values_are_the_defaults():
    """evaluate_images.py: 0.3, 0.9 for counting, at most 16 objects, no suppression, 0.1."""
    reward = Geneval()
    assert (reward.threshold, reward.counting_threshold, reward.max_objects) == (0.3, 0.9, 16)
    assert (reward.overlap, reward.position_threshold) == (1.0, 0.1)
