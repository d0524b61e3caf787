"""The only writer and reader of checkpoints: complete or absent, verified on load, nothing unpickled.

A checkpoint is a folder step-000200 with safetensors, written by torch.distributed.checkpoint, one file a rank
that holds shards, and manifest.json with their hashes and its own. It is written under another name, fsynced and
renamed; older ones are pruned after that. Any number of ranks, sharded or not, reads what any other has written.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from corefit.errors import TrainingError
from corefit.system import files
from corefit.system.ranks import SINGLE, Ranks

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
FORMAT = 3
UNDIGESTED = 2
"""The last format whose manifest had no digest of its own; such checkpoints are still read."""
PARTIAL = ".partial-"
FILE = 1 << 28
"""Bytes of one file of a rank's, or of one tensor: a rank writes that much at a time."""


@frozen(eq=False)
class Checkpoint:
    """A whole checkpoint on the disk."""

    path: Path
    step: int
    info: Mapping[str, Any]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of each tensor."""
        reader: Any = _reader(self.path)
        return {name: tuple(t.size) for name, t in reader.read_metadata().state_dict_metadata.items()}

    def read(self, into: Mapping[str, Tensor]) -> None:
        """Fill `into` in place: tensors, or this rank's shards of DTensors. KeyError for one that is not there."""
        from torch.distributed import checkpoint as dcp

        if missing := into.keys() - self.shapes().keys():
            raise KeyError(f"{self.path} has no {', '.join(sorted(missing))}")
        values = {name: t.detach() for name, t in into.items()}
        with _quiet():
            dcp.load(values, storage_reader=_reader(self.path), no_dist=True)


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    info: Mapping[str, Any],
    keep: int,
    ranks: Ranks = SINGLE,
) -> Path:
    """Write the checkpoint of `step` into `folder` and keep the newest `keep`.

    ranks  those that hold shards of `tensors`, all of which call this; SINGLE where this process has everything.
    TrainingError where the disk is full or not writable; what was there stays.
    """
    final, partial = folder / _name(step), folder / f"{PARTIAL}{step:06d}"
    with _disk(folder, step, partial if ranks.main else None):
        if ranks.main:
            sweep(folder)
            partial.mkdir(parents=True)
        hashes = _written(partial, tensors, ranks)
        if ranks.main:
            manifest = {"format": FORMAT, "step": step, "info": dict(info), "sha256": hashes}
            files.write_json(partial / MANIFEST, manifest)
            files.publish(partial, final)
    if ranks.main:
        prune(folder, keep)
    return final


def _written(partial: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, str]:
    """Write the tensors; file name -> sha256, each file hashed by the rank that wrote it."""
    from torch.distributed import checkpoint as dcp

    ranks.barrier()
    numbers = _files(tensors, ranks.world)
    writer = dcp.HuggingFaceStorageWriter(str(partial), fqn_to_index_mapping=numbers, save_distributed=True)
    values = {name: t.detach() for name, t in tensors.items()}
    with _quiet():
        dcp.save(values, storage_writer=writer, process_group=ranks.host, no_dist=ranks.world == 1)
    mine = {f.name: files.sha256(f) for f in partial.glob(f"shard-{ranks.rank + 1:05d}-*.safetensors")}
    every = ranks.all_gather_object(mine)
    return {name: digest for part in every for name, digest in part.items()}


def _files(tensors: Mapping[str, Tensor], world: int) -> dict[str, int]:
    """Name -> number of its file, from 1: a rank copies one file's tensors at a time before it writes them."""
    found: dict[str, int] = {}
    number, held = 1, 0.0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size() / world
        if held and held + size > FILE:
            number, held = number + 1, 0.0
        found[name], held = number, held + size
    return found


def latest(folder: Path, ranks: Ranks = SINGLE) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with newer ones; with `ranks`, all agree on it."""
    damaged: list[str] = []
    for path in reversed(_steps(folder)):
        found, wrong = _verified(path, ranks)
        if found:
            return found, damaged
        damaged.append(f"{path} is damaged ({wrong}); the one before it is used")
    return None, damaged


def _verified(path: Path, ranks: Ranks) -> tuple[Checkpoint | None, str]:
    """The checkpoint in `path`, or what is wrong with it; every rank hashes its share of the files."""
    found, wrong = None, ""
    try:
        manifest = files.read_json(path / MANIFEST, lambda content: content.get("format") == UNDIGESTED)
        found = Checkpoint(path, manifest["step"], manifest["info"])
        if path.name != _name(found.step):
            raise ValueError(f"{MANIFEST} is of step {found.step}")
        if manifest["sha256"].keys() != {file.name for file in path.glob("*.safetensors")}:
            raise ValueError(f"its files are not those that {MANIFEST} names")
        for name in sorted(manifest["sha256"])[ranks.rank :: ranks.world]:
            if files.sha256(path / name) != manifest["sha256"][name]:
                raise ValueError(f"{name} does not have the hash that {MANIFEST} gives")
    except files.Damaged as error:
        wrong = f"{MANIFEST}: {error}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        wrong = str(error) or type(error).__name__
    every = ranks.all_gather_object(wrong)
    faults = [fault for fault in every if fault]
    return (None, faults[0]) if faults else (found, "")


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in _steps(folder)[:-keep]:
        shutil.rmtree(old)


def sweep(folder: Path) -> None:
    """Remove what killed processes have left half written; for the process that owns the run alone."""
    for partial in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(partial)


@contextmanager
def _disk(folder: Path, step: int, partial: Path | None) -> Generator[None]:
    """A disk that refuses is a TrainingError, and `partial` is removed."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except (OSError, CheckpointException) as error:
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        refused = [cause for cause in causes if isinstance(cause, OSError)]
        if not refused:
            raise
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        raise TrainingError(
            f"the checkpoint of step {step} could not be written to {folder}: {refused[0].strerror or refused[0]}; the "
            "ones before it are intact. Make room and run the same command again"
        ) from error


@contextmanager
def _quiet() -> Generator[None]:
    """torch warns of being used by a single process, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _steps(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.exists():
        return []
    found = (p for p in folder.iterdir() if re.fullmatch(r"step-\d{6,}", p.name))
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def _reader(path: Path) -> Any:
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(path))
