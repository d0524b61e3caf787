"""Hashes of weight files: one process of a machine computes each, once, until the file changes.

A file of many gigabytes takes longer to hash than to read. What was computed is kept in the user's cache folder, with
the file's size, number and time stamps. The time of the last change of its status cannot be set by programs that copy
files, so other content has another one.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import ExitStack, suppress
from pathlib import Path

SMALL = 1 << 22
"""Bytes: files up to this size are hashed in less time than it takes to look for a hash."""
SETTLED = 3.0
"""Seconds: a file that changed later may change again within one step of the file system's clock."""
LIMIT = 1000
"""The most hashes that are kept; those that were not used for the longest time go first."""


def digest(file: Path) -> str:
    """Return the sha256 of a file; while one process computes it, the others of the machine wait for that."""
    if file.stat().st_size <= SMALL:
        return _computed(file)
    kept = _folder() / f"{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:32]}.json"
    if found := _read(kept, file):
        return found
    with ExitStack() as held:
        with suppress(OSError):  # a home that cannot be written, or has no locks: each process computes it
            from filelock import FileLock

            kept.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(kept.with_suffix(".lock"), fallback_to_soft=False))
        if found := _read(kept, file):
            return found
        before = _stamp(file)
        found = _computed(file)
        if _stamp(file) == before and time.time() - max(before[2:]) / 1e9 > SETTLED:
            with suppress(OSError):
                _write(kept, {"stamp": before, "sha256": found})
        return found


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "corefit" / "hashes"


def _computed(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _stamp(file: Path) -> list[int]:
    """Return what changes whenever the content does: size, number, and the times of both changes, in ns."""
    stat = file.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def _read(kept: Path, file: Path) -> str:
    """Return the hash that was kept for the file as it is now, or "" if there is none."""
    try:
        content = json.loads(kept.read_bytes())
        return str(content["sha256"]) if content["stamp"] == _stamp(file) else ""
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _write(kept: Path, content: object) -> None:
    """Keep a hash, whole or not at all, and remove the oldest ones beyond LIMIT."""
    part = kept.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(content))
    part.replace(kept)
    others = sorted(kept.parent.glob("*.json"), key=lambda other: other.stat().st_mtime)
    for old in others[:-LIMIT]:
        old.unlink(missing_ok=True)
        old.with_suffix(".lock").unlink(missing_ok=True)
