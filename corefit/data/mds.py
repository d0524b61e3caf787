"""Read and write MDS shards with mosaicml-streaming: only this module imports it, and only inside functions.

Rows are read one at a time through streaming's shard readers, without StreamingDataset and its shared memory, so a
killed run leaves nothing behind that would stop the next. The shards of a remote cache (s3://, gs://, hf:// and
whatever else streaming supports) are fetched into a local folder, each when it is first read.
"""

from __future__ import annotations

import json
import os
import re
import socket
from bisect import bisect_right
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
PARTITION_PREFIX = "part-"
"""The names of a cache's partitions, the folders that its shards are in, begin with this."""
TIMEOUT = 60.0
"""Seconds without data after which an attempt to download fails; the storage's client makes a few attempts."""
CACHE_NAME = re.compile(r"[0-9a-f]{16}(\.parts)?")
"""Matches the names of folders that corefit writes caches to: the first digits of the key."""
SHARD_BYTES = 1 << 26
"""The most bytes in a shard; each is read whole once, to be hashed."""
Row = Mapping[str, Any]


@frozen
class TensorSpec:
    """The dtype (a name of torch's) and the shape of one row of a tensor."""

    dtype: str
    shape: tuple[int, ...]


@frozen(eq=False)
class Writer:
    """Appends rows to the shards in `folder`; `open_writer` opens one."""

    mds: MDSWriter
    folder: Path

    def append(self, row: Row) -> None:
        """Append a row, whose keys are the columns."""
        with _write_errors(self.folder):
            self.mds.write(dict(row))


@contextmanager
def _write_errors(folder: Path) -> Generator[None, None, None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror or error}; free some space there") from error


@contextmanager
def open_writer(folder: Path, columns: Mapping[str, str]) -> Generator[Writer, None, None]:
    """Write shards with these columns (name -> encoding) into an empty folder; the index is written at the end."""
    from streaming.base.format.mds.encodings import is_mds_encoding_safe
    from streaming.base.format.mds.writer import MDSWriter

    assert all(map(is_mds_encoding_safe, columns.values())), "pickled columns would run code when read"
    mds = MDSWriter(columns=dict(columns), out=str(folder), hashes=[HASH], size_limit=SHARD_BYTES)
    try:
        yield Writer(mds, folder)
        with _write_errors(folder):
            mds.finish()
    finally:
        mds.cancel_future_jobs()


def merge_indexes(folder: Path, subfolders: Sequence[str], name: str = INDEX) -> None:
    """Write the index `name` of `folder`: the shards of its `subfolders`, in this order."""
    shards: list[dict[str, Any]] = []
    for subfolder in subfolders:
        for shard in json.loads((folder / subfolder / INDEX).read_bytes())["shards"]:
            shard["raw_data"]["basename"] = f"{subfolder}/{shard['raw_data']['basename']}"
            shards.append(shard)
    (folder / name).write_text(json.dumps({"version": 2, "shards": shards}, sort_keys=True))


@define(eq=False)
class Shards:
    """Random access to the rows of an index. Shard sizes are checked on opening, a shard's hash before its first row.

    remote       the URL of the cache that `folder` is a copy of; a shard that is missing or damaged is fetched
    rebuildable  whether corefit wrote the cache and has its source, so that errors may advise to delete it
    index        the name of the index in `folder`
    """

    folder: Path
    remote: str | None = None
    rebuildable: bool = False
    index: str = INDEX
    shards: list[JointReader] = field(init=False)
    starts: list[int] = field(init=False)
    verified: set[int] = field(init=False, factory=set[int])

    def __attrs_post_init__(self) -> None:
        self.shards = _readers(self.folder / self.index, self.rebuildable)
        self.starts = [0]
        for shard in self.shards:
            self.starts.append(self.starts[-1] + len(shard))
            if not self.remote and (wrong := self._wrong_size(shard)):
                raise damaged(self._file(shard), wrong, rebuildable=self.rebuildable)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Row:
        """Return a decoded row; DataError names a shard that is missing or damaged."""
        number = self._number(index)
        if number not in self.verified:
            self._verify(self.shards[number])
            self.verified.add(number)
        return self.shards[number].get_item(index - self.starts[number])

    def _number(self, index: int) -> int:
        """Return the number of the shard that has the row `index`."""
        return bisect_right(self.starts, index) - 1

    def partition(self, index: int) -> str:
        """Return the folder of the partition that the row `index` is in."""
        return self.shards[self._number(index)].raw_data.basename.partition("/")[0]

    @property
    def bytes(self) -> int:
        """The bytes of all shards."""
        return sum(shard.raw_data.bytes for shard in self.shards)

    def _verify(self, shard: JointReader) -> None:
        """Raise DataError unless the shard is what the index says; a remote one is first fetched again."""
        wrong, file = self._wrong(shard), self._file(shard)
        if wrong and self.remote:
            with locked(self.folder):  # one process of the machine fetches it, and the others then find it
                wrong = self._wrong(shard)
                if wrong:
                    fetch(f"{self.remote}/{shard.raw_data.basename}", file)
                    wrong = self._wrong(shard)
        if wrong:
            where = f"{self.remote}/{shard.raw_data.basename}" if self.remote else file
            raise damaged(where, wrong, rebuildable=self.rebuildable)

    def _wrong(self, shard: JointReader) -> str:
        """Return what is wrong with the local file, or an empty string."""
        from streaming.base.hashing import get_hash

        if wrong := self._wrong_size(shard):
            return wrong
        same = get_hash(HASH, self._file(shard).read_bytes()) == shard.raw_data.hashes[HASH]
        return "" if same else f"its {HASH} does not match {self.index}"

    def _wrong_size(self, shard: JointReader) -> str:
        file, expected = self._file(shard), shard.raw_data.bytes
        if not file.is_file():
            return "it is missing"
        size = file.stat().st_size
        return "" if size == expected else f"it has {size} bytes instead of {expected}"

    def _file(self, shard: JointReader) -> Path:
        return self.folder / shard.raw_data.basename


def fetch(url: str, file: Path) -> Path:
    """Download `url` to a temporary file, rename it to `file` when complete, and return it.

    The storage's usual environment variables hold the credentials. DataError if the client's retries all fail.
    """
    from streaming.base.storage.download import CloudDownloader

    partial = file.with_name(f".{file.name}.{socket.gethostname()}-{os.getpid()}")
    partial.unlink(missing_ok=True)
    try:
        CloudDownloader.direct_download(url, str(partial), TIMEOUT)
        partial.replace(file)
    except Exception as error:  # each storage's client has exceptions of its own
        partial.unlink(missing_ok=True)
        raise DataError(
            f"{url} cannot be fetched: {type(error).__name__}: {error}. Check the address, the credentials and the "
            "endpoint (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, S3_ENDPOINT_URL)"
        ) from error
    return file


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Let one process of the machine at a time fetch into `folder`, which is created; a kill releases the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder / ".lock"):
        for stale in folder.rglob(f".*.{socket.gethostname()}-*"):
            stale.unlink()
        yield


def damaged(file: Path | str, what: str, *, rebuildable: bool = False) -> DataError:
    """Return the error for a damaged file of a cache.

    rebuildable  whether corefit wrote the cache and has its source; only then, and only if the folder has a name that
                 corefit gives, does the message advise to delete it
    """
    inner = [folder for folder in Path(file).parents[:2] if folder.name.startswith(PARTITION_PREFIX)]
    cache = inner[0].parent if inner else Path(file).parent
    if rebuildable and CACHE_NAME.fullmatch(cache.name):
        return DataError(f"{file} is damaged: {what}. Delete {cache}; it is then encoded again from the source")
    return DataError(
        f"{file} is damaged: {what}. Copy the whole cache there again, or give its source instead ([data] source)"
    )


def _readers(index: Path, rebuildable: bool) -> list[JointReader]:
    from streaming.base.format import reader_from_json

    try:
        rows = json.loads(index.read_bytes())["shards"]
        shards: list[Any] = [reader_from_json(str(index.parent), None, row) for row in rows]
        for shard in shards:
            shard.validate(False)
            shard.raw_data.hashes[HASH]
    except (OSError, ValueError, LookupError, TypeError, AssertionError) as error:
        raise damaged(index, f"{type(error).__name__}: {error}", rebuildable=rebuildable) from None
    return shards
