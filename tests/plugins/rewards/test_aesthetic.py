"""aesthetic scores as the published code does: a head on normalized features of CLIP's pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published import PROMPTS, head, pictures, spread, tiny_clip
from transformers import CLIPImageProcessorFast, CLIPModel

from corefit.testing import check_reward
from corefit_rewards.aesthetic import Aesthetic


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny_clip(tmp_path_factory.mktemp("aesthetic"), seed=4)
    torch.save({f"layers.{name}": t for name, t in own_head().state_dict().items()}, made / "aesthetic-model.pth")
    return made


def own_head() -> torch.nn.Module:
    return spread(head(16), 5, gain=2.5)


def reward(folder: Path, **keys: object) -> Aesthetic:
    return Aesthetic(**{"path": str(folder), "head": str(folder), **keys})


@pytest.mark.parametrize("size", [(50, 41), (28, 28), (20, 64)])
def test_it_scores_as_published(folder: Path, size: tuple[int, int]) -> None:
    media = pictures(*size)
    pixels = CLIPImageProcessorFast.from_pretrained(folder)(list(media), do_rescale=False, return_tensors="pt")
    with torch.no_grad():
        features = CLIPModel.from_pretrained(folder).eval().get_image_features(**pixels)
        expected = own_head()(features / features.norm(dim=1, keepdim=True))[:, 0]
    found = reward(folder).score(media, PROMPTS, [{}] * 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found.std() > 0.01


def test_the_kit_finds_nothing(folder: Path) -> None:
    check_reward(reward(folder))
