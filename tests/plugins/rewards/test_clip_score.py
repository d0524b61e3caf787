"""clip_score scores as CLIPModel of transformers does, with the preprocessing of its processor."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Project
from published import PROMPTS, pictures, reward, tiny_clip
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPImageProcessorFast, CLIPModel


def of_library(folder: Path, images: CLIPImageProcessor, media: Tensor, **keys: bool) -> Tensor:
    """The cosines [B] by the library's own model, tokenizer and preprocessing."""
    tokenizer = AutoTokenizer.from_pretrained(folder)  # CLIPProcessor does the same, not with all of transformers 4
    tokens = tokenizer(list(PROMPTS), padding=True, truncation=True, return_tensors="pt")
    pixels = images(list(media), return_tensors="pt", **keys)
    with torch.no_grad():
        out = CLIPModel.from_pretrained(folder).eval()(**tokens, **pixels)
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
    folder, media = Path(shutil.copytree(folders["clip_score"], tmp_path / "other")), pictures()
    own = CLIPImageProcessorFast.from_pretrained(folder, size={"shortest_edge": 40}, image_mean=[0.5, 0.4, 0.3])
    own.save_pretrained(folder)
    found = reward("clip_score", folder).score(media, PROMPTS, [{}] * 3)
    torch.testing.assert_close(found, of_library(folder, own, media, do_rescale=False), rtol=0, atol=1e-5)
    assert (found - reward("clip_score", folders["clip_score"]).score(media, PROMPTS, [{}] * 3)).abs().max() > 1e-3


def test_a_pipeline_trains_on_it_and_is_judged_by_it(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both with one network, which is read from a folder beside the pipeline file."""
    from corefit_rewards import clip

    reads: list[str] = []
    load = clip.ClipReward.load_clip
    monkeypatch.setattr(clip.ClipReward, "load_clip", lambda self, *rest: reads.append(rest[0]) or load(self, *rest))
    tiny_clip(project.folder / "clip")
    project.swap(
        (
            'reward = [{ use = "bright", weight = 1.0 }]',
            'reward = [{ use = "clip_score", path = "clip", weight = 2.0 }]',
        ),
        ('reward = [{ use = "bright" }]', 'reward = [{ use = "clip_score", path = "clip", pool = "min" }]'),
    )
    ended = project.main("run", "pipeline.toml")
    assert ended.status == 0, ended.err
    results = json.loads(next(project.folder.glob("runs/*/results.json")).read_text())
    assert {(row["stage"], row["metric"]) for row in results} == {(s, "clip_score") for s in ("base", "soar", "grpo")}
    assert len({row["value"] for row in results if row["category"] == "all"}) > 1
    assert len(reads) == 1


def test_check_says_what_the_folder_lacks_and_counts_the_network(project: Project) -> None:
    tiny_clip(project.folder / "clip", pixels=224)
    project.swap(('reward = [{ use = "bright" }]', 'reward = [{ use = "clip_score", path = "clip" }]'))
    (project.folder / "clip" / "model.safetensors").write_bytes(b"not read")
    ended = project.main("check", "pipeline.toml")
    assert ended.status == 0, ended.err
    assert "rewards " in ended.out
    (project.folder / "clip" / "model.safetensors").unlink()
    ended = project.main("check", "pipeline.toml")
    assert ended.status == 2
    assert re.search(r"error: eval.reward.clip_score: .*clip: it has no model.safetensors or", ended.err)


def test_half_weights_are_computed_in_float32(folders: dict[str, Path], tmp_path: Path) -> None:
    """transformers 5 reads a model in the type of its file, unless it is told otherwise."""
    half, whole = (Path(shutil.copytree(folders["clip_score"], tmp_path / name)) for name in ("half", "whole"))
    network = CLIPModel.from_pretrained(half).half()
    network.save_pretrained(half)
    network.float().save_pretrained(whole)
    first, second = (reward("clip_score", folder).score(pictures(), PROMPTS, [{}] * 3) for folder in (half, whole))
    assert first.dtype == torch.float32
    assert torch.equal(first, second)
