"""Source: Parquet files, as data sets on the Hugging Face hub are stored, with media in a column or beside them."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from attrs import define, field, frozen

from corefit.data.sources.captions import parse_captions
from corefit.data.sources.further import check_names
from corefit.data.sources.remote import Store, check_address, found, hidden, is_remote, located, opened, parent, shown
from corefit.errors import DataError
from corefit.types import ArchiveMember, Example, Source, Url

SUFFIX = ".parquet"
ROWS = 1024
"""Rows of captions and metadata that are read at once."""
KEPT = 2
"""Row groups of media that are kept in memory for each file: those on both sides of a boundary."""


@frozen
class Parquet(Source):
    """Reads an example from each row of Parquet files: captions, media and, from the other columns, `meta`."""

    path: Path | Url | tuple[Path | Url, ...] = field(validator=check_address)
    """A file, a folder of them, a pattern with *, or a list, or addresses, such as
    hf://datasets/org/name/data/train-*.parquet."""
    prompt: str = "text"
    """The column of prompts, or of lists of captions."""
    media: str | None = "image"
    """The column of media, or none for prompts alone: bytes, {bytes, path} as on the hub, or paths or addresses."""
    meta: tuple[str, ...] | None = None
    """The columns that become metadata; by default all others that JSON can hold."""
    extra: Mapping[str, str] = field(factory=dict[str, str], validator=check_names)
    """Further media by name, each with its column, such as { rejected = "image_rejected" }."""
    root: Path | Url | None = field(default=None, validator=check_address)
    """The folder, or its address, that paths of media are relative to; by default that of each Parquet file."""

    def examples(self) -> Iterator[Example]:
        """Yield an example for each row, in the order of the files; media are read when they are decoded."""
        store = Store()
        for place in self._places():
            table = Table(place, store.version(place) if is_remote(place) else "")
            yield from self._examples(table, store)

    def _places(self) -> list[Path | Url]:
        given = self.path if isinstance(self.path, tuple) else (self.path,)
        places = [place for one in given for place in _expanded(one)]
        if not places:
            raise DataError(f"{', '.join(map(shown, given))} names no Parquet files; `path` must name some")
        return places

    def _examples(self, table: Table, store: Store) -> Iterator[Example]:
        media = {**({"": self.media} if self.media else {}), **self.extra}
        for column in (self.prompt, *media.values(), *(self.meta or ())):
            if column not in table.columns:
                raise DataError(f"{table} has no column {column!r}; it has {', '.join(table.columns)}")
        columns = {
            name: Media(table, column, self.root or parent(table.place), store) for name, column in media.items()
        }
        names = self._meta(table)
        texts = [self.prompt, *names, *(name for each in columns.values() for name in each.read_first)]
        for number, row in enumerate(table.rows([*dict.fromkeys(texts)])):
            try:
                prompt = parse_captions(row[self.prompt])
            except ValueError as error:
                raise DataError(f"{table}: row {number}: {self.prompt!r} {error}") from None
            found = {name: column.medium(number, row) for name, column in columns.items()}
            yield Example(prompt, found.pop("", None), {name: row[name] for name in names}, found)

    def _meta(self, table: Table) -> list[str]:
        """Return the names of the columns that become metadata."""
        read = {self.prompt, self.media, *self.extra.values()}
        if self.meta is None:
            return [name for name in table.columns if name not in read and _is_json(table.schema.field(name).type)]
        for name in self.meta:
            if not _is_json(kind := table.schema.field(name).type):
                raise DataError(
                    f"{table}: column {name!r} has values of type {kind}, which JSON cannot hold; name the columns "
                    "that become metadata with `meta`, or none: meta = []"
                )
        return list(self.meta)


@define(eq=False)
class Table:
    """A Parquet file, opened whenever something of it is read; several threads may read media of it.

    version  what a store says that identifies its bytes; "" for a file of this machine
    """

    place: Path | Url
    version: str = ""
    footer: Any = field(init=False)
    starts: list[int] = field(init=False)
    """The number of the first row of each row group, and of all rows."""
    _groups: dict[tuple[str, int], Any] = field(init=False, factory=dict[tuple[str, int], Any])
    _lock: threading.Lock = field(init=False, factory=threading.Lock)

    def __attrs_post_init__(self) -> None:
        with self._opened() as file:
            self.footer = file.metadata
        groups = (self.footer.row_group(n).num_rows for n in range(self.footer.num_row_groups))
        self.starts = list(accumulate(groups, initial=0))

    def __str__(self) -> str:
        return shown(self.place)

    @property
    def schema(self) -> Any:
        return self.footer.schema.to_arrow_schema()

    @property
    def columns(self) -> list[str]:
        return self.schema.names

    def rows(self, columns: list[str]) -> Iterator[Mapping[str, Any]]:
        """Yield the values of these columns, row by row."""
        with self._opened() as file:
            for batch in file.iter_batches(ROWS, columns=columns):
                yield from batch.to_pylist()

    def value(self, column: str, row: int) -> Any:
        """Return one value, and keep its row group in memory for the next ones."""
        group = bisect_right(self.starts, row) - 1
        with self._lock:
            if (column, group) not in self._groups:
                for old in [key for key in self._groups if key[0] == column][: 1 - KEPT]:
                    del self._groups[old]
                with self._opened() as file:
                    self._groups[column, group] = file.read_row_group(group, columns=[column]).column(0)
            values = self._groups[column, group]
        return values[row - self.starts[group]].as_py()

    def is_empty(self, column: str, row: int) -> bool:
        """Return whether the file says that the row group of `row` has no value in a column such as "image.bytes"."""
        group = self.footer.row_group(bisect_right(self.starts, row) - 1)
        found = (group.column(n) for n in range(group.num_columns))
        counts = (each.statistics for each in found if each.path_in_schema == column)
        return any(each is not None and each.has_null_count and each.null_count == group.num_rows for each in counts)

    @contextmanager
    def _opened(self) -> Generator[Any]:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ModuleNotFoundError:
            raise DataError("Parquet files are read with pyarrow: pip install 'corefit[remote]'") from None
        try:
            with opened(self.place) as file:
                try:
                    yield pq.ParquetFile(file, metadata=getattr(self, "footer", None), pre_buffer=True)
                except pa.ArrowException as error:
                    raise self._damaged(error) from error
        except FileNotFoundError:
            raise DataError(f"{self} does not exist: `path` must name a Parquet file, or several") from None
        except OSError as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> DataError:
        return DataError(f"{self} is damaged or no Parquet file: {error}; fetch it again")


@define(eq=False)
class Media:
    """A column of media, in one of the forms that Parquet files have them in.

    folder  what paths are relative to
    store   what is asked for the versions of files at addresses
    """

    table: Table
    column: str
    folder: Path | Url
    store: Store
    form: str = field(init=False)

    def __attrs_post_init__(self) -> None:
        from pyarrow import types

        kind = self.table.schema.field(self.column).type
        if types.is_struct(kind) and "bytes" in (names := [kind.field(n).name for n in range(kind.num_fields)]):
            self.form = "struct" if "path" in names else "bare struct"
        elif types.is_binary(kind) or types.is_large_binary(kind):
            self.form = "bytes"
        elif types.is_string(kind) or types.is_large_string(kind):
            self.form = "path"
        else:
            raise DataError(
                f"{self.table}: column {self.column!r} is {kind}, expected media: bytes, {{bytes, path}} or paths"
            )

    @property
    def read_first(self) -> list[str]:
        """The columns to read with the captions: paths, and not the media."""
        return {"struct": [f"{self.column}.path"], "path": [self.column]}.get(self.form, [])

    def medium(self, number: int, row: Mapping[str, Any]) -> Path | ArchiveMember:
        """Return the medium of a row; it is read when it is decoded."""
        found = row.get(self.column)
        path = (found or {}).get("path") if self.form == "struct" else found
        stored = f"{self.column}.bytes" if "struct" in self.form else self.column
        if path and (self.form == "path" or self.table.is_empty(stored, number)):
            return self.store.medium(located(self.folder, path))
        where = f"{self.table}: row {number}, {self.column}{f': {path}' if path else ''}"
        place, version = self.table.place, f"{self.table.version} {number} {self.column}"

        def read() -> bytes:
            value = None if self.form == "path" else self.table.value(stored, number)
            value = value["bytes"] if isinstance(value, dict) else value
            if value is None:
                raise DataError(f"{where}: there is no {self.column!r}; give the row one")
            return value

        return ArchiveMember(
            where, read, None if is_remote(place) else Path(place), (lambda: version) if self.table.version else None
        )


def _expanded(place: Path | Url) -> list[Path | Url]:
    """Return the files that a place names: those of a folder or of a pattern with *, or the file itself."""
    if is_remote(place):
        return [*found(place, SUFFIX)]
    path = Path(place)
    if "*" in path.name:
        return sorted(path.parent.glob(path.name))
    if not path.is_dir():
        return [path]
    inside = (file for file in path.rglob(f"*{SUFFIX}") if not hidden(file.relative_to(path).as_posix()))
    return sorted(inside)


def _is_json(kind: Any) -> bool:
    """Return whether JSON can hold the values of a column of this type."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
        return _is_json(kind.value_type)
    if types.is_struct(kind):
        return all(_is_json(kind.field(n).type) for n in range(kind.num_fields))
    plain = (types.is_integer, types.is_floating, types.is_boolean, types.is_string, types.is_large_string)
    return any(fits(kind) for fits in plain)
