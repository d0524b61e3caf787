"""Source: a JSON Lines file with an example on each line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from attrs import field, frozen

from corefit.data.sources.captions import as_json, parse_captions
from corefit.data.sources.further import check_names
from corefit.data.sources.remote import Store, check_address, lines, located, parent, shown
from corefit.errors import DataError
from corefit.types import ArchiveMember, Example, Source, Url

MEDIA = "media"
KEY = re.compile(r"\{([^{}]+)\}")


@frozen
class Jsonl(Source):
    """Reads one JSON object from each line: a prompt, possibly a media file, and other keys, which become `meta`."""

    path: Path | Url = field(validator=check_address)
    """The JSON Lines file, or its address, such as s3://bucket/data.jsonl; blank lines are skipped."""
    media: str = MEDIA
    """The key of the media file, or a file name made from keys, such as "{md5}.png"; all lines have media, or none."""
    prompt: str = "prompt"
    """The key of the prompt, or of a list of captions from which one is drawn each time."""
    root: Path | Url | None = field(default=None, validator=check_address)
    """The folder, or its address, that media files are relative to; by default the folder of the JSON Lines file."""
    extra: Mapping[str, str] = field(factory=dict[str, str], validator=check_names)
    """Further media by name, each as in `media`: { rejected = "worse" } for {"media": "1.png", "worse": "2.png"}."""

    _store: Store = field(init=False, factory=Store, eq=False, repr=False)

    def examples(self) -> Iterator[Example]:
        """Yield an example for each line, in order; DataError names the file and the line.

        If `media` is not set, the lines may be prompts without media; a key that is set must be on every line.
        """
        self._store.folders.clear()  # files may have changed since
        first: tuple[int, bool] | None = None
        for number, row in self._rows():
            has = self.media != MEDIA or MEDIA in row
            first = first or (number, has)
            if has != first[1]:
                raise self._wrong(number, _mixed(has, first[0]))
            yield self._example(number, row, has)
        if first is None:
            raise DataError(f"{shown(self.path)} is empty: expected one JSON object a line with a {self.prompt!r}")

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        if isinstance(self.path, Path) and not self.path.is_file():
            raise DataError(f"{self.path} does not exist or is not a file: `path` must name a JSON Lines file")
        try:
            for number, line in enumerate(lines(self.path), 1):
                if line.strip():
                    yield number, self._object(number, line)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}; mend that and run again") from error

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
            prompt = parse_captions(self._value(number, row, self.prompt))
        except ValueError as error:
            raise self._wrong(number, f"{self.prompt!r} {error}") from None
        file = self._file(number, row, self.media) if has_media else None
        extra = {name: self._file(number, row, key) for name, key in self.extra.items()}
        read = (self.prompt, self.media, *self.extra.values())
        return Example(prompt, file, {key: value for key, value in row.items() if key not in read}, extra)

    def _file(self, number: int, row: dict[str, Any], key: str) -> Path | ArchiveMember:
        """Return the media file of a line that `key` names; it is a key, or a file name made from keys."""
        if KEY.search(key):
            name = KEY.sub(lambda found: self._text(number, row, found[1], (str, int)), key)
        else:
            name = self._text(number, row, key, (str,))
        return self._store.medium(located(self.root or parent(self.path), name))

    def _text(self, number: int, row: dict[str, Any], key: str, kinds: tuple[type, ...]) -> str:
        value = self._value(number, row, key)
        if type(value) not in kinds:
            raise self._wrong(number, f"{key!r} is {as_json(value)}, expected a string")
        return str(value)

    def _value(self, number: int, row: dict[str, Any], key: str) -> Any:
        if key not in row:
            raise self._wrong(number, f"there is no {key!r}; the line has {', '.join(map(repr, row)) or 'no keys'}")
        return row[key]

    def _wrong(self, number: int, what: str) -> DataError:
        return DataError(f"{shown(self.path)}:{number}: {what}")


def _mixed(has: bool, first: int) -> str:
    found, before = ("has a", "has none") if has else ("has no", "has one")
    return f"this line {found} {MEDIA!r} but line {first} {before}; give every line media, or none"
