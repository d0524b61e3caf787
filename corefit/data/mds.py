"""MDS shards through mosaicml-streaming: the only module that imports it, and only inside functions.

Shards lie in a folder and are read one sample at a time through streaming's own shard readers, without
StreamingDataset: no shared memory, no leases, so nothing of a killed run is in the way of the next. Those of a
remote cache (s3://, gs://, hf://, what streaming knows) are first fetched into the folder, each when it is needed.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define, field, frozen

from corefit.errors import DataError
from corefit.system import files

if TYPE_CHECKING:
    from streaming.base.format.base.reader import JointReader
    from streaming.base.format.mds.writer import MDSWriter

HASH = "xxh64"
INDEX = "index.json"
PART = "part-"
"""Folders of a cache in which its shards lie begin so."""
TIMEOUT = 60.0
"""Seconds without a byte after which a download is given up; the storage's own client tries a few times."""
OWN = re.compile(r"[0-9a-f]{16}(\.parts)?")
"""Name of a folder that corefit makes for a cache: the beginning of its key."""
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


def join(folder: Path, parts: Sequence[str]) -> None:
    """Write the index of `folder` for the shards of its subfolders `parts`, in their order."""
    shards: list[dict[str, Any]] = []
    for part in parts:
        for shard in json.loads((folder / part / INDEX).read_bytes())["shards"]:
            shard["raw_data"]["basename"] = f"{part}/{shard['raw_data']['basename']}"
            shards.append(shard)
    (folder / INDEX).write_text(json.dumps({"version": 2, "shards": shards}, sort_keys=True))


@define(eq=False)
class Shards:
    """Random access to the rows of a folder. Sizes are checked on opening, a hash before a shard's first row.

    remote  URL of the shards that `folder` holds copies of; one that is missing or damaged here is fetched
    remade  whether a source is there from which corefit makes `folder` again, which it has made
    """

    folder: Path
    remote: str | None = None
    remade: bool = False
    shards: list[JointReader] = field(init=False)
    starts: list[int] = field(init=False)
    verified: set[int] = field(init=False, factory=set[int])

    def __attrs_post_init__(self) -> None:
        self.shards = _readers(self.folder, self.remade)
        self.starts = [0]
        for shard in self.shards:
            self.starts.append(self.starts[-1] + len(shard))
            if not self.remote and (wrong := self._wrong_size(shard)):
                raise damaged(self._file(shard), wrong, remade=self.remade)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Row:
        """The row, decoded; DataError names a shard that is missing or damaged."""
        from bisect import bisect_right

        number = bisect_right(self.starts, index) - 1
        if number not in self.verified:
            self._verify(self.shards[number])
            self.verified.add(number)
        return self.shards[number].get_item(index - self.starts[number])

    def _verify(self, shard: JointReader) -> None:
        """Nothing of a shard is read before it is what the index says; a remote one gets one more chance."""
        wrong, file = self._wrong(shard), self._file(shard)
        if wrong and self.remote:
            with locked(self.folder):  # one of a machine's processes fetches, the others find it
                wrong = self._wrong(shard)
                if wrong:
                    fetch(f"{self.remote}/{shard.raw_data.basename}", file)
                    wrong = self._wrong(shard)
        if wrong:
            where = f"{self.remote}/{shard.raw_data.basename}" if self.remote else file
            raise damaged(where, wrong, remade=self.remade)

    def _wrong(self, shard: JointReader) -> str:
        """What is wrong with the local file, or nothing."""
        from streaming.base.hashing import get_hash

        if wrong := self._wrong_size(shard):
            return wrong
        same = get_hash(HASH, self._file(shard).read_bytes()) == shard.raw_data.hashes[HASH]
        return "" if same else f"its {HASH} is not the one in {INDEX}"

    def _wrong_size(self, shard: JointReader) -> str:
        file, expected = self._file(shard), shard.raw_data.bytes
        if not file.is_file():
            return "it is missing"
        size = file.stat().st_size
        return "" if size == expected else f"it has {size} bytes instead of {expected}"

    def _file(self, shard: JointReader) -> Path:
        return self.folder / shard.raw_data.basename


def fetch(url: str, file: Path) -> Path:
    """Download `url` and make it appear as `file`, whole, with the storage's usual environment variables.

    DataError, after the client's own retries, where that fails.
    """
    from streaming.base.storage.download import CloudDownloader

    partial = file.with_name(f".{file.name}.{socket.gethostname()}-{os.getpid()}")
    partial.unlink(missing_ok=True)
    try:
        CloudDownloader.direct_download(url, str(partial), TIMEOUT)
        partial.replace(file)
    except Exception as error:  # each storage's client has its own; all are told alike
        partial.unlink(missing_ok=True)
        raise DataError(
            f"{url} cannot be fetched: {type(error).__name__}: {error}. Check the address, the credentials and the "
            "endpoint (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, S3_ENDPOINT_URL)"
        ) from error
    return file


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """One process of the machine at a time fetches into `folder`, which is made; a killed one holds nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder / ".lock"):
        for stale in folder.rglob(f".*.{socket.gethostname()}-*"):
            stale.unlink()
        yield


def damaged(file: Path | str, what: str, *, remade: bool = False) -> DataError:
    """What to say of a file of a cache that cannot be trained on.

    remade  whether corefit made the cache under its own name and has a source to make it from again; only such a
            folder is ever named as one to delete
    """
    cache = Path(file).parent.parent if Path(file).parent.name.startswith(PART) else Path(file).parent
    if remade and OWN.fullmatch(cache.name):
        return DataError(f"{file} is damaged: {what}. Delete {cache}; it is then made again from the source")
    return DataError(
        f"{file} is damaged: {what}. Put a whole copy of the cache there, or give its source instead ([data] source)"
    )


def _readers(folder: Path, remade: bool) -> list[JointReader]:
    from streaming.base.format import reader_from_json

    try:
        rows = json.loads((folder / INDEX).read_bytes())["shards"]
        shards: list[Any] = [reader_from_json(str(folder), None, row) for row in rows]
        for shard in shards:
            shard.validate(False)
            shard.raw_data.hashes[HASH]
    except (OSError, ValueError, LookupError, TypeError, AssertionError) as error:
        raise damaged(folder / INDEX, f"{type(error).__name__}: {error}", remade=remade) from None
    return shards
