"""clip_score scores as CLIPModel and CLIPProcessor of transformers do, with a gradient, and says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from published import PROMPTS, pictures, tiny_clip
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessorFast, CLIPModel, CLIPProcessor

from corefit.testing import check_reward
from corefit_rewards.clip_score import ClipScore

META: list[dict[str, Any]] = [{}, {}, {}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


def of_library(folder: Path, media: Tensor) -> Tensor:
    """The cosines [B] by the library's own model, tokenizer and preprocessing, which gets the same float pictures."""
    processor = CLIPProcessor(CLIPImageProcessorFast.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    inputs = processor(
        text=list(PROMPTS),
        images=list(media),
        do_rescale=False,
        padding=True,
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        out = CLIPModel.from_pretrained(folder).eval()(**inputs)
    return (out.image_embeds * out.text_embeds).sum(1)


@pytest.mark.parametrize("size", [(50, 41), (28, 28), (20, 64), (97, 96)])
def test_it_scores_as_transformers_does(folder: Path, size: tuple[int, int]) -> None:
    media = pictures(*size)
    found = ClipScore(path=str(folder)).score(media, PROMPTS, META)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, of_library(folder, media), rtol=0, atol=1e-5)
    assert found.std() > 0.01, "the pictures and prompts are told apart"


def test_the_kit_finds_nothing(folder: Path) -> None:
    check_reward(ClipScore(path=str(folder)))
