"""What is known of archives in stores, kept in the user's cache folder: not every process and run reads them anew."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from corefit.errors import DataError
from corefit.system import files

LIMIT = 1 << 30
"""The most bytes that are kept; those that were not used for the longest time go first."""


def folder() -> Path:
    """Return the folder of the indexes."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "corefit" / "archives"


def remembered(identity: str, make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return what `make` returned before for this identity; one process of the machine at a time makes it.

    identity  what changes whenever the result of `make`, which JSON can hold, changes
    """
    file = folder() / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
    if (found := _read(file)) is not None:
        return found
    with ExitStack() as held:
        with suppress(OSError, DataError):  # a home that cannot be written, or has no locks: each process makes its own
            file.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(files.temporary_lock(file.with_suffix(".lock")))
        if (found := _read(file)) is None:
            found = make()
            with suppress(OSError):
                files.write_json(file, found)
                _remove_oldest(file)
    return found


def _read(file: Path) -> Mapping[str, Any] | None:
    try:
        found = files.read_json(file)
        os.utime(file)
    except (OSError, files.Damaged):
        return None
    return found


def _remove_oldest(newest: Path) -> None:
    """Remove indexes that were not used for the longest time, until LIMIT bytes are left; `newest` stays."""
    used = sorted((file.stat().st_mtime, file.stat().st_size, file) for file in newest.parent.glob("*.json"))
    left = sum(size for _, size, _ in used)
    for _, size, file in used:
        if left > LIMIT and file != newest:
            file.unlink(missing_ok=True)
            left -= size
