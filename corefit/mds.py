"""MDS shards through mosaicml-streaming: the only module that imports it, and only inside functions.

Shards are local and read one sample at a time through streaming's own shard readers, without
StreamingDataset: no shared memory, no leases, so nothing of a killed run is in the way of the next.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define, field, frozen

from corefit.errors import DataError

if TYPE_CHECKING:
    from streaming.base.format.base.reader import JointReader
    from streaming.base.format.mds.writer import MDSWriter

HASH = "xxh64"
INDEX = "index.json"
SHARD = 1 << 26
"""Bytes of a shard, at most; it is read whole once, to be hashed."""
Row = Mapping[str, Any]


@frozen(eq=False)
class Writer:
    """Appends rows to the shards in `folder`; `writing` makes one."""

    mds: MDSWriter
    folder: Path

    def append(self, row: Row) -> None:
        """Write a row; its keys are the columns."""
        with _disk(self.folder):
            self.mds.write(dict(row))


@contextmanager
def _disk(folder: Path) -> Generator[None, None, None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror or error}; free some space there") from error


@contextmanager
def writing(folder: Path, columns: Mapping[str, str]) -> Generator[Writer, None, None]:
    """Shards of `columns` (name -> encoding) in an empty `folder`; its index is written at the end."""
    from streaming.base.format.mds.encodings import is_mds_encoding_safe
    from streaming.base.format.mds.writer import MDSWriter

    assert all(map(is_mds_encoding_safe, columns.values())), "pickled columns would run code when read"
    mds = MDSWriter(columns=dict(columns), out=str(folder), hashes=[HASH], size_limit=SHARD)
    try:
        yield Writer(mds, folder)
        with _disk(folder):
            mds.finish()
    finally:
        mds.cancel_future_jobs()


@define(eq=False)
class Shards:
    """Random access to the rows of a folder. Sizes are checked on opening, a hash before a shard's first row."""

    folder: Path
    shards: list[JointReader] = field(init=False)
    starts: list[int] = field(init=False)
    verified: set[int] = field(init=False, factory=set[int])

    def __attrs_post_init__(self) -> None:
        self.shards = _readers(self.folder)
        self.starts = [0]
        for shard in self.shards:
            self.starts.append(self.starts[-1] + len(shard))
            self._check_size(shard)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Row:
        """The row, decoded; DataError names a shard that is missing or damaged."""
        from bisect import bisect_right

        number = bisect_right(self.starts, index) - 1
        self._verify(number)
        return self.shards[number].get_item(index - self.starts[number])

    def _verify(self, number: int) -> None:
        if number in self.verified:
            return
        from streaming.base.hashing import get_hash

        shard = self.shards[number]
        self._check_size(shard)
        if get_hash(HASH, self._file(shard).read_bytes()) != shard.raw_data.hashes[HASH]:
            raise damaged(self._file(shard), f"its {HASH} is not the one in {INDEX}")
        self.verified.add(number)

    def _check_size(self, shard: JointReader) -> None:
        file, expected = self._file(shard), shard.raw_data.bytes
        if not file.is_file():
            raise damaged(file, "it is missing")
        if (size := file.stat().st_size) != expected:
            raise damaged(file, f"it has {size} bytes instead of {expected}")

    def _file(self, shard: JointReader) -> Path:
        return self.folder / shard.raw_data.basename


def damaged(file: Path, what: str) -> DataError:
    """What to say of a file of a cache that cannot be trained on."""
    return DataError(f"{file} is damaged: {what}. Delete {file.parent}; the next run encodes it again")


def _readers(folder: Path) -> list[JointReader]:
    from streaming.base.format import reader_from_json

    try:
        rows = json.loads((folder / INDEX).read_bytes())["shards"]
        shards: list[Any] = [reader_from_json(str(folder), None, row) for row in rows]
        for shard in shards:
            shard.validate(False)
            shard.raw_data.hashes[HASH]
    except (OSError, ValueError, LookupError, TypeError, AssertionError) as error:
        raise damaged(folder / INDEX, f"{type(error).__name__}: {error}") from None
    return shards
