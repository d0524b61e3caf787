"""JSON Lines: a prompt, or a prompt and its media, a line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from attrs import frozen

from corefit.data.sources.captions import captions, shown
from corefit.errors import DataError
from corefit.types import Example, Source

MEDIA = "media"
KEY = re.compile(r"\{([^{}]+)\}")


@frozen
class Jsonl(Source):
    """One JSON object a line: a prompt, a media file if there is one, and anything else, which becomes `meta`."""

    path: Path
    """The file; blank lines in it are skipped."""
    media: str = MEDIA
    """The key that holds the media file, or a name made of keys, such as "{md5}.png"; every line has it or none."""
    prompt: str = "prompt"
    """The key that holds the prompt, or a list of captions of which each time one is drawn."""
    root: Path | None = None
    """Folder that media files are relative to; that of the file itself unless set."""

    def examples(self) -> Iterator[Example]:
        """All lines in order; DataError names the file and the line.

        Lines without media are prompts alone where `media` is what it is by default; a key that is named must be there.
        """
        first: tuple[int, bool] | None = None
        for number, row in self._rows():
            has = self.media != MEDIA or MEDIA in row
            first = first or (number, has)
            if has != first[1]:
                raise self._wrong(number, _mixed(has, first[0]))
            yield self._example(number, row, has)
        if first is None:
            raise DataError(f"{self.path} is empty: expected one JSON object a line with a {self.prompt!r}")

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        if not self.path.is_file():
            raise DataError(f"{self.path} does not exist or is not a file: `path` must name a JSON Lines file")
        try:
            lines = self.path.open("rb")
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}; mend that and run again") from error
        with lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, self._object(number, line)

    def _object(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row: Any = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise self._wrong(number, f"this is not JSON ({error}); write one object a line") from None
        if not isinstance(row, dict):
            raise self._wrong(number, f"found a {type(row).__name__}, expected an object such as {{...}}")
        return cast(dict[str, Any], row)

    def _example(self, number: int, row: dict[str, Any], has_media: bool) -> Example:
        try:
            prompt = captions(self._value(number, row, self.prompt))
        except ValueError as error:
            raise self._wrong(number, f"{self.prompt!r} {error}") from None
        file = (self.root or self.path.parent) / self._name(number, row) if has_media else None
        return Example(prompt, file, {key: value for key, value in row.items() if key not in (self.prompt, self.media)})

    def _name(self, number: int, row: dict[str, Any]) -> str:
        """Of the media file."""
        if KEY.search(self.media):
            return KEY.sub(lambda key: self._text(number, row, key[1], (str, int)), self.media)
        return self._text(number, row, self.media, (str,))

    def _text(self, number: int, row: dict[str, Any], key: str, kinds: tuple[type, ...]) -> str:
        value = self._value(number, row, key)
        if type(value) not in kinds:
            raise self._wrong(number, f"{key!r} is {shown(value)}, expected a string")
        return str(value)

    def _value(self, number: int, row: dict[str, Any], key: str) -> Any:
        if key not in row:
            raise self._wrong(number, f"there is no {key!r}; the line has {', '.join(map(repr, row)) or 'no keys'}")
        return row[key]

    def _wrong(self, number: int, what: str) -> DataError:
        return DataError(f"{self.path}:{number}: {what}")


def _mixed(has: bool, first: int) -> str:
    found, before = ("has a", "has none") if has else ("has no", "has one")
    return f"this line {found} {MEDIA!r} but line {first} {before}; give every line media, or none"
