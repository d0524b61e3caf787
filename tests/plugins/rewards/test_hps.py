"""hps reads open_clip's tensors into CLIPModel, scores as the published code does, and says what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published import PROMPTS, OpenClip, pictures, save_processor, spread
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, normalize, pad, resize
from transformers import AutoTokenizer

from corefit.testing import check_reward
from corefit_rewards.hps import Hps
from corefit_rewards.pictures import MEAN, STD


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("hps")
    save_processor(made)
    torch.save({"epoch": 1, "state_dict": network().state_dict()}, made / "HPS_v2.1_compressed.pt")
    return made


def network() -> OpenClip:
    made = OpenClip()
    spread(made, 5)
    return made


def reward(folder: Path, **keys: object) -> Hps:
    return Hps(path=str(folder), processor=str(folder), **{"dtype": "fp32", **keys})


def published(pictures: Tensor) -> Tensor:
    """The pixels as HPSv2's transform makes them: the longer edge to the network's, and black bars."""
    height, width = pictures.shape[-2:]
    scale = 28 / max(height, width)
    new = [round(height * scale), round(width * scale)]
    small = resize(pictures, new, InterpolationMode.BICUBIC)
    rest = [28 - new[1], 28 - new[0]]
    bars = [rest[0] // 2, rest[1] // 2, rest[0] - rest[0] // 2, rest[1] - rest[1] // 2]
    return normalize(pad(small, bars), list(MEAN), list(STD))


@pytest.mark.parametrize("size", [(50, 41), (28, 28), (31, 64)])
def test_it_scores_as_open_clip_does(folder: Path, size: tuple[int, int]) -> None:
    media = pictures(*size)
    tokens = AutoTokenizer.from_pretrained(folder)(
        list(PROMPTS), padding="max_length", truncation=True, max_length=12, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        expected = network()(published(media), tokens)
    found = reward(folder).score(media, PROMPTS, [{}] * 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found.std() > 0.005


def test_the_kit_finds_nothing(folder: Path) -> None:
    check_reward(reward(folder))
