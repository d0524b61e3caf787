"""Locks, and what to say where a file system refuses: full, read-only, without locks.

Locks are filelock's on the file system's own (flock): they go with the process however it ends, kill -9 too, and a
file that is left of one blocks nobody.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from corefit.errors import DataError

ROOM = "make room there"
REMEDIES = {
    errno.ENOSPC: ROOM,
    errno.EDQUOT: f"{ROOM}, or ask for a larger quota",
    errno.EFBIG: "its file system or a limit (ulimit -f) allows no file so large",
    errno.EROFS: "mount it for writing",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENFILE: "close other programs: the machine has too many open files",
    errno.EIO: "look after its disk",
    errno.ENOTDIR: "a file is where a folder is needed: move it away",
    errno.EISDIR: "a folder is where a file is needed: move it away",
    errno.EEXIST: "something else is in its place: move it away",
    errno.ESTALE: "mount it again",
    errno.ENOTCONN: "mount it again",
}
"""What to do about each way in which a file system refuses, whoever owns the file."""
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
RUST = re.compile(r"os error (\d+)|Os \{ code: (\d+)")
"""How safetensors, which is written in Rust, says the number of a system's error."""


@contextmanager
def written(folder: Path) -> Generator[None]:
    """Within, a file system that refuses raises DataError; `folder` is named where the system names no file."""
    try:
        yield
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        raise _refused(error.filename or folder, error.errno, error.strerror) from error
    except Exception as error:
        number = _of_safetensors(error)
        if number not in REMEDIES:
            raise
        raise _refused(folder, number, str(error)) from error


def _of_safetensors(error: Exception) -> int:
    """The number of the system's error that safetensors tells of; 0 where it is none."""
    from safetensors import SafetensorError

    found = RUST.search(str(error)) if isinstance(error, SafetensorError) else None
    return int(found[1] or found[2]) if found else 0


def _refused(where: object, number: int, reason: str | None) -> DataError:
    return DataError(
        f"{where} cannot be written: {reason}; {REMEDIES[number]}, and the same command goes on where it was"
    )


@contextmanager
def locked(file: Path, *, wait: bool = True) -> Generator[bool]:
    """Hold the lock `file`; wait=False gives False where another process does, instead of waiting for it.

    Raises DataError where the file system has no locks, or refuses the file.
    """
    from filelock import FileLock, Timeout

    # a lock of another kind, a file whose being there is the lock, would be left by a killed process
    lock = FileLock(file, blocking=wait, fallback_to_soft=False)
    try:
        with written(file):
            lock.acquire()
    except Timeout:
        yield False
        return
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise DataError(
            f"{file} cannot be locked: {error.strerror}. Without locks two processes could write to one folder; mount "
            "this file system with them (NFS: its lock service; Lustre: -o flock), or put the folder on another one"
        ) from error
    try:
        yield True
    finally:
        lock.release()


@contextmanager
def held(file: Path) -> Generator[None]:
    """Wait for the lock `file` and hold it; it is gone afterwards."""
    with locked(file):
        try:
            yield
        finally:
            file.unlink(missing_ok=True)  # while it is held: filelock takes a removed file for no lock


def sweep(folder: Path) -> None:
    """Remove locks (*.lock) of killed processes: nobody holds them."""
    for file in folder.glob("*.lock"):
        with suppress(OSError, DataError), locked(file, wait=False) as free:
            if free:
                file.unlink(missing_ok=True)
