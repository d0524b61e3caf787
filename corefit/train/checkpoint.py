"""The only writer and reader of checkpoints: they are complete or absent, verified on load, and nothing is unpickled.

A checkpoint is a folder such as step-000200. In it lie safetensors, which torch.distributed.checkpoint writes on each
rank that holds shards, and manifest.json with their hashes and its own. The folder is written under another name,
fsynced and renamed; older checkpoints are removed after that. What any number of ranks has written, sharded or not, any
other number can read.
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
    import torch
    from torch import Tensor

MANIFEST = "manifest.json"
FORMAT = 3
LAST_WITHOUT_DIGEST = 2
"""The last format whose manifest had no digest of its own; such checkpoints are still read."""
PARTIAL = ".partial-"
"""How the name of a folder begins while it is being written."""
FILE_BYTES = 1 << 28
"""Largest size of a file, unless one tensor is larger: a rank copies one file's tensors before it writes them."""


@frozen(eq=False)
class Checkpoint:
    """A complete checkpoint on the disk; `info` is what `save` was given beside the tensors."""

    path: Path
    step: int
    info: Mapping[str, Any]

    def stored(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return name -> shape and dtype of each tensor."""
        reader: Any = _reader(self.path)
        found = reader.read_metadata().state_dict_metadata
        return {name: (tuple(t.size), t.properties.dtype) for name, t in found.items()}

    def read(self, into: Mapping[str, Tensor]) -> None:
        """Fill the tensors of `into` in place, DTensors with this rank's shards; KeyError where one is not stored."""
        from torch.distributed import checkpoint as dcp

        if missing := into.keys() - self.stored().keys():
            raise KeyError(f"{self.path} has no {', '.join(sorted(missing))}")
        values = {name: t.detach() for name, t in into.items()}
        with _ignore_single_process_warning():
            dcp.load(values, storage_reader=_reader(self.path), no_dist=True)


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    info: Mapping[str, Any],
    keep: int,
    ranks: Ranks = SINGLE,
) -> Path:
    """Write the checkpoint of `step` into `folder`, then remove all but the newest `keep`; return the new one's path.

    Raises TrainingError where the disk is full or not writable; earlier checkpoints stay.

    ranks  the ranks that hold shards of `tensors`, which must all call this; SINGLE where this process holds them whole
    """
    final, partial = folder / _folder_name(step), folder / f"{PARTIAL}{step:06d}"
    with _explain_disk_errors(folder, step, partial if ranks.main else None):
        if ranks.main:
            remove_partial(folder)
            partial.mkdir(parents=True)
        hashes = _write_tensors(partial, tensors, ranks)
        if ranks.main:
            manifest = {"format": FORMAT, "step": step, "info": dict(info), "sha256": hashes}
            files.write_json(partial / MANIFEST, manifest)
            files.publish(partial, final)
    if ranks.main:
        keep_newest(folder, keep)
    return final


def _write_tensors(partial: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, str]:
    """Write the tensors; return file name -> sha256, each file hashed by the rank that wrote it."""
    from torch.distributed import checkpoint as dcp

    ranks.barrier()
    numbers = _file_numbers(tensors, ranks.world)
    numbers = {name: number for each in reversed(ranks.all_gather_object(numbers)) for name, number in each.items()}
    writer = dcp.HuggingFaceStorageWriter(str(partial), fqn_to_index_mapping=numbers, save_distributed=True)
    values = {name: t.detach() for name, t in tensors.items()}
    with _ignore_single_process_warning():
        dcp.save(values, storage_writer=writer, process_group=ranks.host, no_dist=ranks.world == 1)
    mine = {f.name: files.sha256(f) for f in partial.glob(f"shard-{ranks.rank + 1:05d}-*.safetensors")}
    every = ranks.all_gather_object(mine)
    return {name: digest for hashes in every for name, digest in hashes.items()}


def _file_numbers(tensors: Mapping[str, Tensor], world: int) -> dict[str, int]:
    """Return tensor name -> number of its file, from 1, so that no file is larger than FILE_BYTES."""
    numbers: dict[str, int] = {}
    number, filled = 1, 0.0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size() / world
        if filled and filled + size > FILE_BYTES:
            number, filled = number + 1, 0.0
        numbers[name], filled = number, filled + size
    return numbers


def latest(folder: Path, ranks: Ranks = SINGLE) -> tuple[Checkpoint | None, list[str]]:
    """Find the newest undamaged checkpoint, and say what is wrong with newer ones; all `ranks` get the same answer."""
    damaged: list[str] = []
    # rank 0's list is that of all: on another machine some may not be there (yet)
    for name in ranks.from_main(lambda: [path.name for path in reversed(_complete(folder))]):
        path = folder / name
        found, wrong = _verify(path, ranks)
        if found:
            return found, damaged
        damaged.append(f"{path} is damaged ({wrong}); the one before it is used")
    return None, damaged


def _verify(path: Path, ranks: Ranks) -> tuple[Checkpoint | None, str]:
    """Return the checkpoint in `path`, or what is wrong with it; every rank hashes its share of the files."""
    found, wrong = None, ""
    try:
        manifest = files.read_json(path / MANIFEST, lambda content: content.get("format") == LAST_WITHOUT_DIGEST)
        found = Checkpoint(path, manifest["step"], manifest["info"])
        if path.name != _folder_name(found.step):
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


def keep_newest(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in _complete(folder)[:-keep]:
        shutil.rmtree(old)


def remove_partial(folder: Path) -> None:
    """Remove checkpoints that a killed process left half written. Only the main process of a run may call this."""
    for partial in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(partial)


@contextmanager
def _explain_disk_errors(folder: Path, step: int, partial: Path | None) -> Generator[None]:
    """Turn an error of the file system inside into a TrainingError, and remove the folder `partial`."""
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
def _ignore_single_process_warning() -> Generator[None]:
    """Hide torch's warning that its distributed checkpoints are used by a single process, as they are here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _folder_name(step: int) -> str:
    return f"step-{step:06d}"


def _complete(folder: Path) -> list[Path]:
    """List the complete checkpoints of a folder, oldest first."""
    if not folder.exists():
        return []
    found = (p for p in folder.iterdir() if re.fullmatch(r"step-\d{6,}", p.name))
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def _reader(path: Path) -> Any:
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(path))
