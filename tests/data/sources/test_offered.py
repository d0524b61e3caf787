"""Sources in a pipeline: `corefit check` accepts correct data, and exits with status 2 for wrong data."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from conftest import Project

JSONL = 'source = { use = "jsonl", path = "train.jsonl" }'


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def pack(folder: Path) -> None:
    """Write the examples of train.jsonl into two tars."""
    for shard, part in enumerate((rows(folder)[:5], rows(folder)[5:])):
        with tarfile.open(folder / f"data-{shard}.tar", "w") as tar:
            for number, row in enumerate(part):
                tar.add((folder / str(row["media"])).resolve(), f"{number}.png")
                (folder / "caption.txt").write_text(str(row["prompt"]))
                tar.add(folder / "caption.txt", f"{number}.txt")


def save(folder: Path) -> None:
    """Write the examples of train.jsonl as a Hugging Face dataset."""
    datasets = pytest.importorskip("datasets")
    names = [str((folder / str(row["media"])).resolve()) for row in rows(folder)]
    columns = {"image": names, "text": [row["prompt"] for row in rows(folder)], "number": list(range(8))}
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(folder / "saved")


def test_tars(project: Project) -> None:
    pack(project.folder)
    project.swap((JSONL, 'source = { use = "webdataset", path = "data-{0..1}.tar" }'))
    assert project.main("check", "pipeline.toml").status == 0
    tar = project.folder / "data-1.tar"
    with tarfile.open(tar) as file:
        end = file.getmembers()[2].offset
    tar.write_bytes(tar.read_bytes()[:end])
    ended = project.main("check", "pipeline.toml")
    assert ended.status == 2
    assert f"data-1.tar is damaged: it is cut off or unreadable from byte {end} on; fetch it again" in ended.err


def test_saved_datasets(project: Project) -> None:
    save(project.folder)
    project.swap((JSONL, 'source = { use = "hf_dataset", path = "saved", meta = ["number"] }'))
    assert project.main("check", "pipeline.toml").status == 0
    project.swap(('"number"', '"nummer"'))
    ended = project.main("check", "pipeline.toml")
    assert ended.status == 2
    assert "has no column 'nummer'; it has image, text, number" in ended.err


def test_media_names_made_of_keys(project: Project) -> None:
    project.swap((JSONL, 'source = { use = "jsonl", path = "train.jsonl", media = "{number}.png", root = "media" }'))
    assert project.main("check", "pipeline.toml").status == 0
    project.swap(("{number}", "{md5}"))
    ended = project.main("check", "pipeline.toml")
    assert ended.status == 2
    assert "train.jsonl:1: there is no 'md5'; the line has 'prompt', 'media', 'number'" in ended.err
