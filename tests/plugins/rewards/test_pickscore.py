"""pickscore is the cosine times the learned scale, over 26 as in Flow-GRPO."""

from __future__ import annotations

from pathlib import Path

import torch
from published import PROMPTS, pictures, reward, tiny_clip
from transformers import CLIPModel

from corefit_rewards.pickscore import PickScore


def test_it_is_the_cosine_times_the_scale(folders: dict[str, Path]) -> None:
    folder, media = folders["pickscore"], pictures()
    cosine = reward("clip_score", folder).score(media, PROMPTS, [{}] * 3)
    scale = CLIPModel.from_pretrained(folder).logit_scale.exp().detach()
    found, published = (
        reward("pickscore", folder, **keys).score(media, PROMPTS, [{}] * 3) for keys in ({}, {"divisor": 1.0})
    )
    torch.testing.assert_close(found, scale * cosine / 26)
    torch.testing.assert_close(published, scale * cosine)


def test_the_processor_may_be_in_another_folder_as_it_is_on_the_hub(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tiny_clip(tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "preprocessor_config.json"):
        (folder / name).unlink(missing_ok=name == "vocab.json")  # transformers 5 writes none
    own = PickScore(path=str(folder), processor=str(folders["pickscore"]))
    own.check()
    media = pictures()
    expected = reward("pickscore", folders["pickscore"]).score(media, PROMPTS, [{}] * 3)
    assert torch.equal(own.score(media, PROMPTS, [{}] * 3), expected)
