"""Checkpoints: whole or absent, verified, pruned after the new one is there."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from corefit.errors import TrainingError
from corefit.system import files
from corefit.train import checkpoint as state


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {
        "weights/a": torch.full((3, 2), value),
        "means/loss": torch.tensor([value, 2.0], dtype=torch.float64),
        "count": torch.tensor(value),
    }


def read(found: state.Checkpoint) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    into = {name: torch.zeros_like(t) for name, t in tensors(0).items()}
    found.read(into)
    return into


def test_a_round_trip_keeps_bits_and_the_newest(tmp_path):
    for step in (1, 2, 3):
        state.save(tmp_path, step, tensors(step / 3), {"seconds": step / 7}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003"]
    found, damaged = state.latest(tmp_path)
    assert found is not None
    assert (found.step, found.info, damaged) == (3, {"seconds": 3 / 7}, [])
    shapes = {name: shape for name, (shape, _) in found.stored().items()}
    assert shapes == {"weights/a": (3, 2), "means/loss": (2,), "count": ()}
    made = read(found)
    assert all(torch.equal(made[name], t) for name, t in tensors(1.0).items())


def test_a_tensor_that_is_not_there_is_named(tmp_path):
    state.save(tmp_path, 1, tensors(1), {}, keep=1)
    found, _ = state.latest(tmp_path)
    assert found is not None
    with pytest.raises(KeyError, match=r"step-000001 has no ema/a"):
        found.read({"ema/a": torch.zeros(3, 2)})


def test_a_missing_folder_has_no_checkpoint(tmp_path):
    assert state.latest(tmp_path / "no") == (None, [])


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (999_999, 1_000_000):
        state.save(tmp_path, step, tensors(1), {}, keep=2)
    assert state.latest(tmp_path)[0].step == 1_000_000


MANIFESTS = {
    "a digit": lambda content: content | {"step": 1},
    "emptied hashes": lambda content: content | {"sha256": {}},
    "no digest": lambda content: {key: value for key, value in content.items() if key != "digest"},
    "former, a digit": lambda content: former(content) | {"step": 1},
    "former, emptied hashes": lambda content: former(content) | {"sha256": {}},
    "no numbers": lambda content: former(content) | {"step": "two"},
    "a list": lambda content: [content],
}
"""What may become of a manifest."""


def former(content: dict[str, Any]) -> dict[str, Any]:
    """A manifest as the format before digests had it."""
    return {key: value for key, value in content.items() if key != "digest"} | {"format": state.LAST_WITHOUT_DIGEST}


def test_one_of_the_former_format_is_read(tmp_path):
    manifest = state.save(tmp_path, 1, tensors(1), {}, keep=3) / state.MANIFEST
    manifest.write_text(json.dumps(former(json.loads(manifest.read_text()))))
    assert state.latest(tmp_path)[0].step == 1


@pytest.mark.parametrize("harm", ["flip", "truncate", "no manifest", "no tensors", *MANIFESTS])
def test_a_damaged_one_is_named_and_the_one_before_used(tmp_path, harm):
    state.save(tmp_path, 1, tensors(1), {}, keep=3)
    last = state.save(tmp_path, 2, tensors(2), {}, keep=3)
    (file,) = last.glob("*.safetensors")
    if harm == "flip":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif harm == "truncate":
        file.write_bytes(file.read_bytes()[:-4])
    elif harm in MANIFESTS:
        manifest = last / state.MANIFEST
        manifest.write_text(json.dumps(MANIFESTS[harm](json.loads(manifest.read_text()))))
    else:
        (last / state.MANIFEST if harm == "no manifest" else file).unlink()
    found, damaged = state.latest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert len(damaged) == 1
    assert str(last) in damaged[0]


def test_a_partial_one_is_never_read_and_removed_by_the_next(tmp_path):
    state.save(tmp_path, 1, tensors(1), {}, keep=3)
    (tmp_path / ".partial-000002").mkdir()
    (tmp_path / ".partial-000002" / "shard-00009-of-00009.safetensors").write_bytes(b"half")
    assert state.latest(tmp_path)[0].step == 1
    assert (tmp_path / ".partial-000002").exists()
    state.save(tmp_path, 2, tensors(2), {}, keep=3)
    assert [f.name for f in (tmp_path / "step-000002").glob("shard-00009*")] == []
    assert not list(tmp_path.glob(".partial-*"))


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_the_umask_says_who_may_read_what_is_published(tmp_path, umask):
    """safetensors makes files that their owner alone may read."""
    former, other = os.umask(umask), tmp_path / "other"
    try:
        (tmp_path / "partial" / "inner").mkdir(parents=True)
        other.write_text("")
        other.chmod(0o600)
        for name in ("a", "inner/b"):
            save_file({"t": torch.ones(1)}, tmp_path / "partial" / name)
        os.link(other, tmp_path / "partial" / "link")
        files.publish(tmp_path / "partial", tmp_path / "final")
    finally:
        os.umask(former)
    modes = {name: (tmp_path / "final" / name).stat().st_mode & 0o777 for name in ("a", "inner/b", "link")}
    assert modes == {"a": 0o666 & ~umask, "inner/b": 0o666 & ~umask, "link": 0o600}, "what is linked is not ours alone"


def test_a_full_disk_leaves_the_last_good_one(tmp_path, monkeypatch):
    state.save(tmp_path, 1, tensors(1), {}, keep=3)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save", full)
    with pytest.raises(TrainingError, match=r"step 2 could not be written .*No space left.*Make room"):
        state.save(tmp_path, 2, tensors(2), {}, keep=1)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert state.latest(tmp_path)[0].step == 1


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("fails", [["safetensors.torch.save"], ["os.rename", "os.replace"]], ids=["write", "publish"])
def test_none_is_pruned_before_the_new_one_is_whole(tmp_path, monkeypatch, fails, keep):
    """Pruning first would leave one fewer to go back to, or none, if the new one never comes to be."""
    for step in (1, 2):
        state.save(tmp_path, step, tensors(step), {}, keep=2)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for name in fails:
        monkeypatch.setattr(name, full)
    with pytest.raises(TrainingError, match="step 3 could not be written"):
        state.save(tmp_path, 3, tensors(3), {}, keep=keep)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


def test_nothing_is_pickled(tmp_path):
    path = state.save(tmp_path, 1, tensors(1), {"seconds": 1.0}, keep=1)
    assert sorted(p.suffix for p in path.rglob("*")) == [".json", ".safetensors"]
    assert json.loads((path / state.MANIFEST).read_text())["step"] == 1
