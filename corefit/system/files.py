"""Files: written whole or not at all, hashed, locked; and what to say where a file system refuses.

Locks are filelock's on the file system's own (flock): they go with the process however it ends, kill -9 too, and a
file that is left of one blocks nobody.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

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


DIGEST = "digest"
"""The key, beside those of the content, of the content's digest."""


def write_whole(path: Path, data: bytes) -> None:
    """Replace `path` by `data`; a reader, also after a crash, sees the old or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def publish(partial: Path, final: Path) -> None:
    """Make the folder `partial` appear as `final`, whole, also after a power cut; a former `final` goes."""
    wanted = partial.stat().st_mode & 0o666
    for file in partial.rglob("*"):
        if file.is_file() and not file.is_symlink():
            _readable(file, wanted)
            sync(file)
    sync(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    sync(final.parent)


def _readable(file: Path, wanted: int) -> None:
    """Give a file the mode that the umask gave its folder; safetensors writes for the owner alone.

    Hard links are left as they are: the file is someone else's as well.
    """
    stat = file.stat()
    if stat.st_nlink == 1 and (mode := stat.st_mode & 0o7777) | wanted != mode:
        file.chmod(mode | wanted)


def sync(path: Path) -> None:
    """fsync a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def sources(file: Path) -> list[Path]:
    """All Python files of a package, for which its __init__.py stands, or the one file of a module."""
    found = sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
    return [each for each in found if each.is_file()]


def source(file: Path) -> str:
    """Hash of the `sources` of a package or module."""
    return hashlib.sha256(b"\0".join(each.read_bytes() for each in sources(file))).hexdigest()


class Damaged(ValueError):
    """A file is not as it was written; the message says how, in a few words, without the file's name."""


def json_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of what the content says, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Replace `file` as a whole by the content and its digest. `content` must not have the key "digest"."""
    assert DIGEST not in content, f"{DIGEST!r} is the digest's own key"
    plain = json.loads(json.dumps(content))
    write_whole(file, json.dumps({**plain, DIGEST: json_digest(plain)}, indent=1).encode())


def read_json(file: Path, former: Callable[[Mapping[str, Any]], bool] = lambda content: False) -> dict[str, Any]:
    """Return the content of `file`, without its digest.

    former  says of content without a digest whether it is what corefit wrote before such files had one
    Raises FileNotFoundError, and Damaged.
    """
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise Damaged(f"it cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise Damaged("it is not a JSON object")
    found = content.pop(DIGEST, None)
    if found is None and former(content):
        return content
    if found != json_digest(content):
        raise Damaged("its content does not have the digest that is in it" if found else "it has no digest")
    return content


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
