"""plugin_name, a source for corefit: a CSV file of prompts and their pictures or videos."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from corefit import Example, Offers, Source, hookimpl
from corefit.errors import DataError

COREFIT_API = "1.0"


@frozen
class PluginName(Source):
    """Reads a CSV file with column names: a prompt and a media file per line; other columns become `meta`, as text."""

    path: Path
    """The CSV file, in UTF-8; paths of media are relative to its folder."""
    prompt: str = "prompt"
    """Name of the column of prompts."""
    media: str = "media"
    """Name of the column of pictures or videos; a file without this column has prompts alone."""

    def examples(self) -> Iterator[Example]:
        """Yield all lines in order; a DataError names the file and the line."""
        if not self.path.is_file():
            raise DataError(f"{self.path} does not exist or is not a file: `path` must name a CSV file")
        empty = True
        with self.path.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines, strict=True)
            try:
                for row in rows:
                    empty = False
                    yield self._example(row, f"{self.path}:{rows.line_num}")
            except (csv.Error, UnicodeDecodeError) as error:
                raise DataError(f"{self.path}:{rows.line_num}: no CSV in UTF-8 ({error})") from None
        if empty:
            raise DataError(f"{self.path} has no lines; write column names and a {self.prompt!r} per line")

    def _example(self, row: Mapping[str | Any, str | Any], where: str) -> Example:
        if None in row or None in row.values():  # csv has a key None for too many fields, a value None for too few
            raise DataError(f"{where}: the line has more or fewer columns than the first line names")
        if self.prompt not in row:
            raise DataError(f"{where}: there is no column {self.prompt!r}; there are: {', '.join(row)}")
        if self.media in row and not row[self.media]:
            raise DataError(f"{where}: {self.media!r} is empty; give every line media, or leave the column out")
        file = row.get(self.media)
        meta = {name: text for name, text in row.items() if name not in (self.prompt, self.media)}
        return Example(row[self.prompt], self.path.parent / file if file else None, meta)


@hookimpl
def corefit_sources() -> Offers[Source]:
    return {"plugin_name": PluginName}
