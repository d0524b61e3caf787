"""clip_score scores as CLIPModel and CLIPProcessor of transformers do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published import PROMPTS, pictures, reward
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPImageProcessorFast, CLIPModel, CLIPProcessor


def of_library(folder: Path, images: CLIPImageProcessor, media: Tensor, **keys: bool) -> Tensor:
    """The cosines [B] by the library's own model, tokenizer and preprocessing."""
    processor = CLIPProcessor(images, AutoTokenizer.from_pretrained(folder))
    inputs = processor(
        text=list(PROMPTS), images=list(media), padding=True, truncation=True, return_tensors="pt", **keys
    )
    with torch.no_grad():
        out = CLIPModel.from_pretrained(folder).eval()(**inputs)
    return (out.image_embeds * out.text_embeds).sum(1)


@pytest.mark.parametrize("size", [(50, 41), (28, 28), (20, 64), (97, 96)])
def test_it_scores_as_transformers_does(folders: dict[str, Path], size: tuple[int, int]) -> None:
    """Which gets the same float pictures, since it would round and clip others."""
    folder, media = folders["clip_score"], pictures(*size)
    found = reward("clip_score", folder).score(media, PROMPTS, [{}] * 3)
    expected = of_library(folder, CLIPImageProcessorFast.from_pretrained(folder), media, do_rescale=False)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found.std() > 0.01, "the pictures and prompts are told apart"


def test_rounding_to_8_bits_changes_little(folders: dict[str, Path]) -> None:
    """As PIL does it, in what most published code scores with."""
    folder, media = folders["clip_score"], pictures(97, 96)
    found = reward("clip_score", folder).score(media, PROMPTS, [{}] * 3)
    rounded = (media * 255).round().byte()
    torch.testing.assert_close(
        found, of_library(folder, CLIPImageProcessor.from_pretrained(folder), rounded), rtol=0, atol=0.02
    )


def test_settings_of_a_folder_are_followed(folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    folder, media = Path(shutil.copytree(folders["clip_score"], tmp_path / "other")), pictures()
    own = CLIPImageProcessorFast.from_pretrained(folder, size={"shortest_edge": 40}, image_mean=[0.5, 0.4, 0.3])
    own.save_pretrained(folder)
    found = reward("clip_score", folder).score(media, PROMPTS, [{}] * 3)
    torch.testing.assert_close(found, of_library(folder, own, media, do_rescale=False), rtol=0, atol=1e-5)
    assert (found - reward("clip_score", folders["clip_score"]).score(media, PROMPTS, [{}] * 3)).abs().max() > 1e-3
