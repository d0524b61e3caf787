"""Which processes of a run see the same folder, and how files reach those that do not.

Machines of a cluster usually mount one file system. Where they do not, each has a folder of its own under the path of
the run's folder. Those who see the same one are a home. torch carries the files from rank 0's home to the others.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from corefit.errors import DataError
from corefit.system import files
from corefit.system.ranks import PATIENCE, Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MARK = ".seen-by-"
APPEARS = 3.0
"""Seconds in which a file that one machine has written must show on another one that mounts the same folder."""
CHUNK = 1 << 26
"""Bytes that are sent at once."""


@frozen(eq=False)
class Homes:
    """The homes of a run's ranks, for one folder.

    ranks    all ranks of the run
    local    those of this rank's home among themselves; for what is read and written there, and not for training
    number   how many homes there are
    keepers  gloo's group of the first rank of each home; None on other ranks, and where there is one home
    """

    ranks: Ranks
    local: Ranks
    number: int = 1
    keepers: ProcessGroup | None = None

    @staticmethod
    def find(folder: Path, ranks: Ranks) -> Homes:
        """Find out who sees `folder`, which is made where it is missing; every rank calls it.

        Each rank writes a file there, and looks for those of the others by their names, which no file system can have
        remembered as missing.
        """
        if ranks.world == 1:
            return Homes(ranks, ranks)
        seen = _look(folder, ranks)
        homes = sorted({tuple(each) for each in ranks.all_gather_object(seen)})
        if len(homes) == 1:
            return Homes(ranks, ranks)
        import torch.distributed as dist

        members = [*homes, [home[0] for home in homes]]
        made: list[Any] = [dist.new_group([*each], timeout=PATIENCE, backend="gloo") for each in members]
        ranks.barrier()  # a group is not whole before all are in it, and one of them may go on to fail
        mine = tuple(seen)
        host = made[homes.index(mine)]
        local = Ranks(mine.index(ranks.rank), len(mine), host=host if len(mine) > 1 else None)
        return Homes(ranks, local, len(homes), made[-1] if local.main else None)

    @property
    def shared(self) -> bool:
        """Whether all ranks see the folder of rank 0."""
        return self.number == 1

    def deliver(self, folder: Path) -> bool:
        """Copy a folder of rank 0 to the homes where it is missing or another; every rank calls it.

        Return whether it was written on this rank's home, by this rank.
        """
        if self.shared:
            return False
        wanted = self.ranks.from_main(lambda: _contents(folder))
        lacks = self.keepers is not None and not self.ranks.main and _contents(folder) != wanted
        if self.ranks.any(lacks) and self.keepers is not None:
            with files.explain_write_errors(folder):
                self._copy(folder, wanted, lacks)
        self.ranks.barrier()
        return lacks

    def _copy(self, folder: Path, wanted: Mapping[str, str], lacks: bool) -> None:
        """Send all files of a folder from rank 0 to the keepers, who write them where they `lack` them."""
        partial = folder.with_name(f".partial-{folder.name}")
        if lacks:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        for name in wanted:
            self._copy_file(folder / name, partial / name if lacks else None)
        if lacks:
            if _contents(partial) != wanted:
                raise DataError(f"{folder} changed while it was copied to this machine; run the same command again")
            files.publish(partial, folder)

    def _copy_file(self, source: Path, target: Path | None) -> None:
        import torch
        import torch.distributed as dist

        main = self.ranks.main
        size = torch.tensor(source.stat().st_size if main else 0)
        dist.broadcast(size, group=self.keepers, group_src=0)
        if target:
            target.parent.mkdir(parents=True, exist_ok=True)
        with (source if main else target or Path(os.devnull)).open("rb" if main else "wb") as file:
            for start in range(0, int(size), CHUNK):
                length = min(CHUNK, int(size) - start)
                piece = torch.empty(length, dtype=torch.uint8)
                if main:
                    piece = torch.frombuffer(bytearray(file.read(length)), dtype=torch.uint8)
                dist.broadcast(piece, group=self.keepers, group_src=0)
                if not main:
                    file.write(piece.numpy().tobytes())


def _look(folder: Path, ranks: Ranks) -> Sequence[int]:
    """Return the ranks that see this rank's folder, in order."""
    run = ranks.broadcast_object(uuid.uuid4().hex)
    marks = [folder / f"{MARK}{rank}-{run}" for rank in range(ranks.world)]

    def mark() -> None:
        with files.explain_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            marks[ranks.rank].touch()

    ranks.all_or_none(mark)
    try:
        several = len({*ranks.all_gather_object(socket.gethostname())}) > 1
        until = time.monotonic() + APPEARS * several
        while not (all_seen := all(mark.exists() for mark in marks)) and time.monotonic() < until:
            time.sleep(0.1)
        seen = range(ranks.world) if all_seen else [rank for rank, mark in enumerate(marks) if mark.exists()]
        ranks.barrier()  # before any mark is removed
        return seen
    finally:
        marks[ranks.rank].unlink(missing_ok=True)


def _contents(folder: Path) -> dict[str, str]:
    """Return relative name -> sha256 of each file of a folder."""
    found = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
    return {file.relative_to(folder).as_posix(): files.sha256(file) for file in found}
