"""JSON Lines: a prompt, or a prompt and its media, a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import Formatter
from typing import Any, cast

from attrs import frozen

from corefit.errors import DataError
from corefit.types import Example, Source


@frozen
class Jsonl(Source):
    """One JSON object a line: a prompt, a media file if there is one, and anything else, which becomes `meta`."""

    path: Path
    """The file; blank lines in it are skipped."""
    media: str = "media"
    """The key that holds the media file, or a name made of keys, such as "{md5}.png"; every line has it or none."""
    prompt: str = "prompt"
    """The key that holds the prompt, or a list of captions of which each time one is drawn."""
    root: Path | None = None
    """Folder that media files are relative to; that of the file itself unless set."""

    def examples(self) -> Iterator[Example]:
        """All lines in order; DataError names the file and the line."""
        first: tuple[int, bool] | None = None
        for number, row in self._rows():
            has = self._media_keys <= row.keys()
            first = first or (number, has)
            if has != first[1]:
                raise self._wrong(number, _mixed(self.media, has, first[0]))
            yield self._example(number, row)
        if first is None:
            raise DataError(f"{self.path} is empty: expected one JSON object a line with a {self.prompt!r}")

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        if not self.path.is_file():
            raise DataError(f"{self.path} does not exist or is not a file: `path` must name a JSON Lines file")
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, self._object(number, line)

    def _object(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row: Any = json.loads(line.decode("utf-8-sig"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise self._wrong(number, f"this is not JSON ({error}); write one object a line") from None
        if not isinstance(row, dict):
            raise self._wrong(number, f"found a {type(row).__name__}, expected an object such as {{...}}")
        return cast(dict[str, Any], row)

    @property
    def _media_keys(self) -> set[str]:
        """The keys that the media file's name is made of."""
        return {key for _, key, _, _ in Formatter().parse(self.media) if key} or {self.media}

    def _example(self, number: int, row: dict[str, Any]) -> Example:
        meta = {key: value for key, value in row.items() if key not in (self.prompt, self.media)}
        return Example(self._prompts(number, row), self._file(number, row), meta)

    def _file(self, number: int, row: dict[str, Any]) -> Path | None:
        keys = self._media_keys
        if not keys <= row.keys():
            return None
        texts = {key: self._text(number, row, key) for key in keys}
        name = texts[self.media] if keys == {self.media} else self.media.format(**texts)
        return (self.root or self.path.parent) / name

    def _prompts(self, number: int, row: dict[str, Any]) -> str | Sequence[str]:
        captions = row.get(self.prompt)
        if not isinstance(captions, list):
            return self._text(number, row, self.prompt)
        texts = cast(list[Any], captions)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise self._wrong(number, f"{self.prompt!r} is {json.dumps(texts)[:60]}, expected one or more strings")
        return tuple(texts)

    def _text(self, number: int, row: dict[str, Any], key: str) -> str:
        if key not in row:
            raise self._wrong(number, f"there is no {key!r}; the line has {', '.join(map(repr, row)) or 'no keys'}")
        if not isinstance(row[key], str):
            raise self._wrong(number, f"{key!r} is {json.dumps(row[key])[:60]}, expected a string")
        return row[key]

    def _wrong(self, number: int, what: str) -> DataError:
        return DataError(f"{self.path}:{number}: {what}")


def _mixed(key: str, has: bool, first: int) -> str:
    found, before = ("has a", "has none") if has else ("has no", "has one")
    return f"this line {found} {key!r} but line {first} {before}; give every line media, or none"
