"""The captions of a cache: each is stored once in a partition, and caches that have them in their rows are read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor

from corefit.data import cache, mds, partition, texts
from corefit.data.cache import prepare
from corefit.data.dataset import COND, FINGERPRINTS, ROWS, Dataset
from corefit.data.encode import Encoder
from corefit.data.settings import Data
from corefit.system import files
from corefit.types import Condition, Example

LENGTH, WIDTH = 40, 24
PROMPTS = ("a red 3", "a blue 7", "a red 3", ("two 5s", "a red 3"), "a green 1", "a red 3", "nothing")


class Padded:
    """A backbone whose captions have a token a word, and then zeros."""

    def encoding_key(self) -> Mapping[str, str]:
        return {"text": "padded"}

    def encode_text(self, prompts: Sequence[str]) -> Condition:
        rows = torch.zeros(len(prompts), LENGTH, WIDTH)
        for row, prompt in zip(rows, prompts, strict=True):
            for n, word in enumerate(prompt.split()):
                row[n] = torch.randn(WIDTH, generator=torch.Generator().manual_seed(sum(word.encode())))
        return Condition({"embeds": rows.bfloat16(), "pooled": rows.sum(1), "length": (rows != 0).any(2).sum(1)})

    def null(self, n: int) -> Condition:
        return self.encode_text([""] * n)

    def encode(self, media: Tensor) -> Tensor:
        return media[:, :, ::2, ::2] * 2 - 1

    def latent_shape(self, size: Sequence[int]) -> tuple[int, ...]:
        return (3, size[0] // 2, size[1] // 2)

    def release(self) -> None: ...


@attrs.frozen
class Memory:
    """Pictures of one colour each."""

    def examples(self) -> Iterator[Example]:
        for n, prompt in enumerate(PROMPTS):
            yield Example(prompt, np.full((4, 4, 3), n, np.uint8))


DATA = Data(Memory(), size=(4, 4), encode_batch=2)  # type: ignore[arg-type]


def made(root: Path) -> Path:
    return prepare(DATA, Padded(), root, media=True)  # type: ignore[arg-type]


def expect_all(dataset: Dataset) -> None:
    """Every caption of every example is what the backbone gives for it, to the bit."""
    order = [*range(len(PROMPTS)), 3, 0, 0]
    for choice in (0.0, 0.9):
        batch = dataset.batch(order, range(len(order)), [choice] * len(order))
        captions = [PROMPTS[n] if isinstance(PROMPTS[n], str) else PROMPTS[n][int(2 * choice)] for n in order]
        assert list(batch.prompts) == captions
        for name, tensor in Padded().encode_text(captions).tensors.items():
            assert batch.cond.tensors[name].dtype == tensor.dtype
            assert batch.cond.tensors[name].equal(tensor), name
        assert batch.clean[:, 0, 0, 0].equal(torch.tensor(order).float() / 255 * 2 - 1)


@pytest.mark.parametrize("size", [512, 3])
def test_a_caption_is_stored_once_in_a_partition(tmp_path: Path, monkeypatch: Any, size: int) -> None:
    monkeypatch.setattr(cache, "PARTITION", size)
    dataset = Dataset.open(made(tmp_path))
    expect_all(dataset)
    assert dataset.texts is not None
    assert len(dataset.texts) == (5 if size == 512 else 2 + 3 + 1)
    assert dataset.texts.shards.bytes < 0.5 * len(dataset.texts) * 2 * LENGTH * WIDTH


def test_each_caption_of_a_batch_is_decoded_once(tmp_path: Path, monkeypatch: Any) -> None:
    dataset, read = Dataset.open(made(tmp_path)), list[int]()
    restore = texts.restore
    monkeypatch.setattr(texts, "restore", lambda rows, spec: read.append(len(rows)) or restore(rows, spec))
    dataset.batch([0, 0, 2, 5, 1], range(5))
    assert read == [2, 2, 2], "three tensors of two captions"


def former(folder: Path, rows: Iterator[mds.Row], encoder: Encoder) -> int:
    """Write a partition as former versions did: all captions of an example in its row, as they are."""
    found = list(rows)
    columns = {name: "bytes" if name.startswith(COND) else "json" for name in found[0] if name != "bucket"}
    with mds.open_writer(folder, {**columns, "x0": "ndarray:float32"}) as shards:
        for row in found:
            shards.append({name: value for name, value in row.items() if name != "bucket"})
    lines = ({"bucket": row["bucket"], "meta": row["meta"], FINGERPRINTS: []} for row in found)
    (folder / ROWS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return len(found)


def test_a_cache_that_was_written_before_is_read_and_not_encoded_again(tmp_path: Path, monkeypatch: Any) -> None:
    with monkeypatch.context() as before:
        before.setattr(partition, "write", former)
        folder = made(tmp_path)
    (folder / texts.INDEX).unlink()
    manifest = files.read_json(folder / "done.json")
    del manifest["files"][texts.INDEX]
    files.write_json(folder / "done.json", manifest)
    monkeypatch.setattr(Padded, "encode_text", lambda *_: pytest.fail("encoded again"))
    assert made(tmp_path) == folder
    dataset = Dataset.open(folder)
    monkeypatch.undo()
    assert dataset.texts is None
    expect_all(dataset)


def test_partitions_that_were_written_before_an_update_are_kept(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(cache, "PARTITION", 3)
    written: list[int] = []

    def stopped(folder: Path, rows: Iterator[mds.Row], encoder: Encoder) -> int:
        if written:
            raise KeyboardInterrupt
        written.append(former(folder, rows, encoder))
        return written[0]

    with monkeypatch.context() as before:
        before.setattr(partition, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path)
    dataset = Dataset.open(made(tmp_path))
    assert len([*dataset.shards.folder.glob("part-*/texts")]) == 2
    assert len([*dataset.shards.folder.glob("part-*")]) == 3
    expect_all(dataset)
