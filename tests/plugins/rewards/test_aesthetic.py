"""aesthetic scores as the published code does: a head on normalized features of CLIP's pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published import PROMPTS, head, pictures, reward, spread, tensor
from safetensors.torch import save_file
from transformers import CLIPImageProcessorFast, CLIPModel


@pytest.mark.parametrize("size", [(50, 41), (28, 28), (20, 64)])
def test_it_scores_as_published(folders: dict[str, Path], size: tuple[int, int]) -> None:
    folder, media = folders["aesthetic"], pictures(*size)
    pixels = CLIPImageProcessorFast.from_pretrained(folder)(list(media), do_rescale=False, return_tensors="pt")
    with torch.no_grad():
        features = tensor(CLIPModel.from_pretrained(folder).eval().get_image_features(**pixels))
        expected = spread(head(16), 5, gain=2.5)(features / features.norm(dim=1, keepdim=True))[:, 0]
    found = reward("aesthetic", folder).score(media, PROMPTS, [{}] * 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found.std() > 0.01


def test_the_head_may_be_a_file_of_either_kind(folders: dict[str, Path], tmp_path: Path) -> None:
    folder, media = folders["aesthetic"], pictures()
    pickled = folder / "aesthetic-model.pth"
    save_file(torch.load(pickled, weights_only=True), tmp_path / "own.safetensors")
    scores = [
        reward("aesthetic", folder, head=str(file)).score(media, PROMPTS, [{}] * 3)
        for file in (folder, pickled, tmp_path / "own.safetensors")
    ]
    assert torch.equal(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2])
