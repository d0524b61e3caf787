"""image_reward reads BLIP's tensors into transformers' classes, scores as published, and says what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published import PROMPTS, Blip, bert_tokenizer, pictures, spread
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize
from transformers import AutoTokenizer

from corefit.testing import check_reward
from corefit_rewards.image_reward import ImageReward
from corefit_rewards.pictures import MEAN, STD

PROMPTS = (*PROMPTS[:2], "the letter " * 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = bert_tokenizer(tmp_path_factory.mktemp("image_reward"))
    torch.save(network(made).state_dict(), made / "ImageReward.pt")
    return made


def network(folder: Path) -> Blip:
    made = Blip(len(AutoTokenizer.from_pretrained(folder)))
    spread(made, 5)
    spread(made.mlp, 5, gain=2.5)
    return made


def reward(folder: Path, **keys: object) -> ImageReward:
    return ImageReward(path=str(folder), tokenizer=str(folder), **keys)


@pytest.mark.parametrize("size", [(50, 41), (32, 32), (31, 64)])
def test_it_scores_as_published(folder: Path, size: tuple[int, int]) -> None:
    media = pictures(*size)
    transform = Compose([Resize(32, InterpolationMode.BICUBIC), CenterCrop(32), Normalize(MEAN, STD)])
    tokens = AutoTokenizer.from_pretrained(folder)(
        list(PROMPTS), padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    with torch.no_grad():
        expected = network(folder)(transform(media), tokens.input_ids, tokens.attention_mask)
    found = reward(folder).score(media, PROMPTS, [{}] * 3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.std() > 0.01


def test_the_kit_finds_nothing(folder: Path) -> None:
    check_reward(reward(folder))
