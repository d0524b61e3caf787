"""Source: a Hugging Face dataset that `save_to_disk` wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from attrs import frozen

from corefit.data.sources.captions import parse_captions
from corefit.errors import DataError
from corefit.types import ArchiveMember, Example, Source

DECODED = {"Audio", "Image", "Nifti", "Pdf", "Video"}
"""Types of features whose values are decoder objects, which JSON cannot hold."""


@frozen
class HfDataset(Source):
    """Reads a dataset that `dataset.save_to_disk(path)` wrote; columns besides prompt and media become `meta`."""

    path: Path
    """The dataset's folder; for a DatasetDict, the folder of one split."""
    prompt: str = "text"
    """The column of prompts, or of lists of captions."""
    media: str | None = "image"
    """The column of images, or none for prompts without media."""
    meta: tuple[str, ...] | None = None
    """The columns that become metadata; by default all other columns except images, audio and video."""

    def examples(self) -> Iterator[Example]:
        """Yield an example for each row, in order; images are read when they are decoded. DataError names the row."""
        rows = self._rows()
        names = self._meta(rows)
        images = None if self.media is None else self._images(rows)
        for number, row in enumerate(rows.select_columns([*dict.fromkeys([self.prompt, *names])])):
            yield self._example(number, row, names, images)

    def _rows(self) -> Any:
        try:
            from datasets import load_from_disk
        except ModuleNotFoundError:
            raise DataError("a Hugging Face dataset needs its library: pip install 'corefit[datasets]'") from None
        try:
            rows: Any = load_from_disk(str(self.path))
        except (OSError, ValueError, LookupError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{self.path}: not a complete dataset that save_to_disk wrote ({reason})") from None
        if isinstance(rows, dict):
            splits = ", ".join(str(self.path / name) for name in rows)
            raise DataError(f"{self.path} has several splits; name one: {splits}")
        for column in (self.prompt, self.media, *(self.meta or ())):
            if column is not None and column not in rows.column_names:
                raise DataError(f"{self.path} has no column {column!r}; it has {', '.join(rows.column_names)}")
        return rows

    def _meta(self, rows: Any) -> list[str]:
        """Return the names of the columns that become metadata."""
        decoded = [name for name, feature in rows.features.items() if type(feature).__name__ in DECODED]
        if self.meta is None:
            return [name for name in rows.column_names if name not in (self.prompt, self.media, *decoded)]
        for name in self.meta:
            if name in decoded:
                raise self._no_meta(name, type(rows.features[name]).__name__)
        return list(self.meta)

    def _images(self, rows: Any) -> Any:
        """Return the column of images as undecoded bytes."""
        from datasets import Image

        try:
            return rows.select_columns([self.media]).cast_column(self.media, Image(decode=False))
        except (NotImplementedError, TypeError, ValueError):  # pyarrow's exceptions derive from one of these
            found = rows.features[self.media]
            raise DataError(f"{self.path}: column {self.media!r} is {found}, expected images") from None

    def _example(self, number: int, row: dict[str, Any], names: list[str], images: Any) -> Example:
        where = f"{self.path}: row {number}"
        try:
            prompt = parse_captions(row[self.prompt])
        except ValueError as error:
            raise DataError(f"{where}: {self.prompt!r} {error}") from None
        meta = {name: row[name] for name in names}
        if number == 0:
            self._check_json(meta)
        stored = (
            None
            if images is None
            else ArchiveMember(where, self._reader(where, number, images), self.path / "state.json")
        )
        return Example(prompt, stored, meta)

    def _check_json(self, meta: dict[str, Any]) -> None:
        for name, value in meta.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError):
                raise self._no_meta(name, type(value).__name__) from None

    def _no_meta(self, name: str, kind: str) -> DataError:
        return DataError(
            f"{self.path}: column {name!r} has values of type {kind}, which JSON cannot hold; "
            "name the columns that become metadata with `meta`, or none: meta = []"
        )

    def _reader(self, where: str, number: int, images: Any) -> Callable[[], bytes]:
        def read() -> bytes:
            image = images[number][self.media]
            if image is None:
                raise DataError(f"{where}: there is no {self.media!r}; give the row one")
            try:
                return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
            except OSError as error:
                raise DataError(f"{where}: {image['path']} cannot be read: {error.strerror}") from None

        return read
