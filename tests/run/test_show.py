"""`corefit prepare` and `corefit show`: data encoded before training, and a look at them."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import Project
from PIL import Image

KEYS = 'size = [16, 16]\naspects = ["1:1", "9:4", "4:9"]\nscore = [{ use = "bright" }]\nkeep = "bright > 0.2"'


@pytest.fixture
def mixed(project: Project) -> Project:
    """Pictures of three aspects, each brighter than the one before; a pipeline that sorts and scores them."""
    rows = []
    for n in range(12):
        height, width = [(20, 20), (16, 40), (50, 20)][n % 3]
        Image.fromarray(np.full((height, width, 3), 20 * n, np.uint8)).save(project.folder / f"m{n}.png")
        rows.append({"media": f"m{n}.png", "prompt": [f"a red {n}", f"a blue {n}"], "n": n})
    (project.folder / "train.jsonl").unlink()
    project.lines("train.jsonl", *rows)
    project.swap(("size = [16, 16]", KEYS))
    return project


def test_prepare_says_what_there_is(mixed: Project) -> None:
    ended = mixed.main("prepare", "pipeline.toml")
    assert ended.status == 0, ended.err
    assert "12 examples" in ended.out
    assert "KiB each" in ended.out
    assert "16 x 16 pixels, latents 4 x 8 x 8: 3 examples" in ended.out
    assert "kept by 'bright > 0.2': 9 of 12" in ended.out
    assert "bright " in ended.out
    assert "█" in ended.out
    assert not (mixed.folder / "runs").exists()
    dry = mixed.main("run", "--dry-run", "pipeline.toml")
    assert "cached" in dry.out


def test_a_run_trains_on_batches_of_one_bucket(mixed: Project) -> None:
    ended = mixed.main("run", "pipeline.toml", "--set", "precision='fp32'")
    assert ended.status == 0, ended.err
    again = mixed.main("run", "--dry-run", "pipeline.toml", "--set", "data.keep='bright > 0.1'")
    assert "its data changed" in again.out


def test_show_draws_what_training_sees(mixed: Project) -> None:
    ended = mixed.main("show", "pipeline.toml", "--count", "5")
    assert ended.status == 0, ended.err
    png = mixed.folder / "runs" / "tiny" / "data.png"
    assert f"the first 5 are in {png}" in ended.out
    assert np.asarray(Image.open(png)).std() > 5
    other = mixed.main("show", "pipeline.toml", "--file", "look.png")
    assert "the first 9 are in look.png" in other.out  # all that are kept
    assert (mixed.folder / "look.png").exists()


def test_there_is_nothing_to_show_of_prompts_alone(project: Project) -> None:
    text = project.text
    first, second = text.index("[[stage]]"), text.index("[[stage]]", text.index("[[stage]]") + 1)
    project.write(text[:first] + text[second:])
    ended = project.main("show", "pipeline.toml")
    assert ended.status == 2
    assert "no stage trains on media" in ended.err


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("bright > 0.2", "bright >", "data: keep: 'bright >' is not a filter expression"),
        ("bright > 0.2", "dark > 1", "example 1 has no 'dark'"),
        ("bright > 0.2", "bright > 7", "keeps none of 12 examples: bright is 0"),
        ('"9:4"', '"9x4"', "data: aspects: '9x4' is not an aspect ratio"),
        ('"9:4"', '"64:1"', "data: aspects: '64:1' at this size is 128 x 4 pixels: size ="),
        ('use = "bright" }]\nkeep', 'use = "bleak" }]\nkeep', "'bleak'"),
    ],
)
def test_what_is_wrong_is_named(mixed: Project, old: str, new: str, said: str) -> None:
    mixed.swap((old, new))
    ended = mixed.main("prepare", "pipeline.toml")
    assert ended.status == 2, ended.out
    assert said in ended.err
    assert "Traceback" not in ended.err
