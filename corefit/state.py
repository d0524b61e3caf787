"""The only writer and reader of checkpoints: complete or absent, verified on load, nothing unpickled.

A checkpoint is a folder step-000200 with tensors.safetensors and manifest.json (hashes). It is written under
another name, fsynced and renamed; older ones are pruned after that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from corefit.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"
FORMAT = 1


@frozen(eq=False)
class Checkpoint:
    """What `save` was given, read back."""

    path: Path
    step: int
    tensors: Mapping[str, Tensor]
    info: Mapping[str, Any]


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], info: Mapping[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step` into `folder` and keep the newest `keep`.

    TrainingError where the disk is full or not writable; what was there stays.
    """
    from safetensors.torch import save_file

    final = folder / f"step-{step:06d}"
    partial = folder / f".partial-{step:06d}-{os.getpid()}"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(contiguous, partial / TENSORS)
        manifest = {"format": FORMAT, "step": step, "info": dict(info), "sha256": {TENSORS: digest(partial / TENSORS)}}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        publish(partial, final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise TrainingError(
            f"the checkpoint of step {step} could not be written to {folder}: {error.strerror}; the ones before it "
            "are intact. Make room and run the same command again"
        ) from error
    for old in _steps(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with newer ones."""
    damaged: list[str] = []
    for path in reversed(_steps(folder)):
        try:
            return _read(path), damaged
        except (OSError, ValueError, KeyError) as error:
            damaged.append(f"{path} is damaged ({error}); the one before it is used")
    return None, damaged


def publish(partial: Path, final: Path) -> None:
    """Make the folder `partial` appear as `final`, whole, also after a power cut; a former `final` goes."""
    for file in partial.rglob("*"):
        if file.is_file() and not file.is_symlink():
            sync(file)
    sync(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    sync(final.parent)


def sync(path: Path) -> None:
    """fsync a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(file: Path) -> str:
    """sha256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _steps(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; partial ones of killed runs are swept away."""
    if not folder.is_dir():
        return []
    for partial in folder.glob(".partial-*"):
        if not alive(int(partial.name.rsplit("-", 1)[1])):
            shutil.rmtree(partial, ignore_errors=True)
    return sorted(p for p in folder.iterdir() if re.fullmatch(r"step-\d{6,}", p.name))


def alive(pid: int) -> bool:
    """Whether a process of this machine has the number `pid`, whoever owns it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _read(path: Path) -> Checkpoint:
    from safetensors.torch import load_file

    manifest = json.loads((path / MANIFEST).read_text())
    for name, expected in manifest["sha256"].items():
        if digest(path / name) != expected:
            raise ValueError(f"{name} does not have the hash that {MANIFEST} gives")
    return Checkpoint(path, manifest["step"], load_file(path / TENSORS), manifest["info"])
