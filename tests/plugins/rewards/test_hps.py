"""hps reads open_clip's tensors into CLIPModel, and scores as the published code does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published import LENGTH, PROMPTS, open_clip, pictures, reward
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, normalize, pad, resize
from transformers import AutoTokenizer

from corefit_rewards.hps import renamed
from corefit_rewards.pictures import MEAN, STD


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
def test_it_scores_as_open_clip_does(folders: dict[str, Path], size: tuple[int, int]) -> None:
    media = pictures(*size)
    tokens = AutoTokenizer.from_pretrained(folders["hps"])(
        list(PROMPTS), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        expected = open_clip()(published(media), tokens)
    found = reward("hps", folders["hps"]).score(media, PROMPTS, [{}] * 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found.std() > 0.005


def test_every_tensor_of_the_file_is_used_once(folders: dict[str, Path]) -> None:
    stored = open_clip().state_dict()
    found = dict(renamed(stored))
    assert sum(t.numel() for t in found.values()) == sum(t.numel() for t in stored.values())
    loaded = reward("hps", folders["hps"]).loaded(torch.device("cpu")).network
    assert {*found} == {*loaded.state_dict()}


def test_it_computes_in_half_as_published_unless_told_otherwise() -> None:
    from corefit_rewards.hps import Hps

    assert Hps().dtype == "fp16"
