"""Keeps what was made from files until the files change, so that a page is written again in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from attrs import define, field

T = TypeVar("T")


class Stamp(NamedTuple):
    """What tells whether a file has changed; zeros where there is none."""

    name: str
    changed: int
    size: int


def stamp(file: Path) -> Stamp:
    try:
        found = file.stat()
    except OSError:
        return Stamp(str(file), 0, 0)
    return Stamp(str(file), found.st_mtime_ns, found.st_size)


@define(eq=False)
class Memo:
    """What the last page was made of. `forget` drops what the page before used and this one did not."""

    _kept: dict[Hashable, Any] = field(factory=dict[Hashable, Any])
    _used: dict[Hashable, Any] = field(factory=dict[Hashable, Any])

    def of(self, what: Hashable, files: Sequence[Path], make: Callable[[], T]) -> T:
        """Return what `make` made of `files`, unless one of them has changed; then make it again."""
        key = (what, *map(stamp, files))
        if key not in self._used:
            self._used[key] = self._kept[key] if key in self._kept else make()
        return self._used[key]

    def forget(self) -> None:
        self._kept, self._used = self._used, {}
