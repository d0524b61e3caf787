"""File systems that are full or read-only, for one process alone: a mount namespace of its own (Linux, root)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

NEW_NAMESPACE, READ_ONLY, REMOUNT, BIND, RECURSIVE, PRIVATE = 0x20000, 1, 32, 4096, 16384, 1 << 18


def small(name: str, kibibytes: int) -> Callable[[], None]:
    """A folder of the current one becomes a file system of this size, with what was in it gone from sight."""

    def inside() -> None:
        _apart()
        _mount("tmpfs", name, "tmpfs", 0, f"size={kibibytes}k")

    return inside


def frozen(*names: str) -> Callable[[], None]:
    """Folders of the current one become read-only file systems."""

    def inside() -> None:
        _apart()
        for name in map(os.path.abspath, names):
            _mount(name, name, "", BIND | RECURSIVE, "")
            _mount(name, name, "", BIND | REMOUNT | READ_ONLY, "")
        os.chdir(os.getcwd())  # into what is mounted there now

    return inside


def _apart() -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(NEW_NAMESPACE):
        raise OSError(ctypes.get_errno(), "unshare")
    _mount("none", "/", "", RECURSIVE | PRIVATE, "")


def _mount(source: str, target: str, kind: str, flags: int, options: str) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    code = library.mount(
        source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), options.encode() or None
    )
    if code:
        raise OSError(ctypes.get_errno(), f"mount {target}")
