"""A safetensors file that is written a tensor at a time is one that safetensors reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from corefit.run.publish.single_file import Described, write

TENSORS = {
    "b": torch.arange(6.0).reshape(2, 3),
    "a": torch.arange(5.0).bfloat16(),
    "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "flag": torch.tensor([True, False, True]),
    "number": torch.tensor(7),
    "turned": torch.arange(6.0).reshape(2, 3).T,
    "empty": torch.zeros(0, 4),
}


def written(file: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    write(file, {n: Described(t.dtype, tuple(t.shape)) for n, t in tensors.items()}, tensors.__getitem__, metadata)
    return file


def test_it_is_read_as_it_was_given(tmp_path: Path) -> None:
    file = written(tmp_path / "a.safetensors", TENSORS, title="a model")
    found = load_file(file)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in TENSORS.items())
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "title": "a model"}


def test_tensors_lie_where_safetensors_puts_them(tmp_path: Path) -> None:
    """Aligned to their width, which readers that map the file count on."""
    ours = written(tmp_path / "a.safetensors", TENSORS)
    save_file({n: t.contiguous() for n, t in TENSORS.items()}, tmp_path / "b.safetensors", {"format": "pt"})
    headers = [header(file) for file in (ours, tmp_path / "b.safetensors")]
    assert headers[0] == headers[1]


def header(file: Path) -> dict[str, object]:
    data = file.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def test_a_tensor_that_is_not_as_described_is_not_written(tmp_path: Path) -> None:
    described = {"a": Described(torch.float32, (2,))}
    with pytest.raises(AssertionError, match="a is not as described"):
        write(tmp_path / "a.safetensors", described, lambda name: torch.zeros(3), {})
