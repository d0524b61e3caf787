"""Hugging Face datasets as `save_to_disk` leaves them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attrs import frozen

from corefit.errors import DataError
from corefit.types import Example, Source, Stored


@frozen
class HfDataset(Source):
    """A dataset saved with `dataset.save_to_disk(path)`; columns that are neither prompt nor media become `meta`."""

    path: Path
    """Its folder; of a DatasetDict that of one split."""
    prompt: str = "text"
    """The column of prompts, or of lists of captions."""
    media: str | None = "image"
    """The column of images; none for prompts alone."""

    def examples(self) -> Iterator[Example]:
        """All rows in order; the bytes of an image are read when they are asked for."""
        rows = self._rows()
        for number in range(len(rows)):
            yield self._example(rows, number)

    def _rows(self) -> Any:
        try:
            from datasets import Image, load_from_disk
        except ModuleNotFoundError:
            raise DataError("such datasets are read with their library: pip install 'corefit[datasets]'") from None
        try:
            rows: Any = load_from_disk(str(self.path))
        except (FileNotFoundError, ValueError) as error:
            raise DataError(f"{self.path}: no dataset that save_to_disk wrote ({error})") from None
        if isinstance(rows, dict):
            splits = ", ".join(str(self.path / name) for name in rows)
            raise DataError(f"{self.path} has several splits; name one: {splits}")
        for column in (self.prompt, self.media):
            if column is not None and column not in rows.column_names:
                raise DataError(f"{self.path} has no column {column!r}; it has {', '.join(rows.column_names)}")
        return rows if self.media is None else rows.cast_column(self.media, Image(decode=False))

    def _example(self, rows: Any, number: int) -> Example:
        others = [name for name in rows.column_names if name != self.media]
        row = rows.select_columns(others)[number]
        prompt = row.pop(self.prompt)
        if not prompt:
            raise DataError(f"{self.path}: row {number} has no {self.prompt!r}")
        stored = None if self.media is None else self._stored(rows, number)
        return Example(tuple(prompt) if isinstance(prompt, list) else prompt, stored, row)

    def _stored(self, rows: Any, number: int) -> Stored:
        return Stored(f"{self.path}: row {number}", lambda: self._bytes(rows, number), self.path / "state.json")

    def _bytes(self, rows: Any, number: int) -> bytes:
        image = rows[number][self.media]
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
