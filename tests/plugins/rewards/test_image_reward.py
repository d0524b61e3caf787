"""image_reward reads BLIP's tensors into transformers' classes, and scores as the published code does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published import PROMPTS, blip, pictures, reward
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize
from transformers import AutoTokenizer

from corefit_rewards.pictures import MEAN, STD

LONG = (*PROMPTS[:2], "the letter " * 30)


@pytest.mark.parametrize("size", [(50, 41), (32, 32), (31, 64)])
def test_it_scores_as_published(folders: dict[str, Path], size: tuple[int, int]) -> None:
    folder, media = folders["image_reward"], pictures(*size)
    transform = Compose([Resize(32, InterpolationMode.BICUBIC), CenterCrop(32), Normalize(MEAN, STD)])
    tokens = AutoTokenizer.from_pretrained(folder)(
        list(LONG), padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    with torch.no_grad():
        expected = blip(folder)(transform(media), tokens.input_ids, tokens.attention_mask)
    found = reward("image_reward", folder).score(media, LONG, [{}] * 3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.std() > 0.01


def test_prompts_are_cut_to_35_tokens(folders: dict[str, Path]) -> None:
    media = pictures()[:1].expand(2, -1, -1, -1)
    cut = ("red " * 40, "red " * 33 + "blue " * 7)  # with [CLS] and [SEP], 33 words are 35 tokens
    kept = ("red " * 33, "red " * 32 + "blue")
    for prompts, equal in ((cut, True), (kept, False)):
        one, other = reward("image_reward", folders["image_reward"]).score(media, prompts, [{}] * 2)
        assert torch.equal(one, other) == equal
