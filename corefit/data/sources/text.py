"""Prompts in a text file, and which source reads a file of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

from corefit.data.sources.jsonl import Jsonl
from corefit.errors import DataError
from corefit.types import Example, Source


@frozen
class Text(Source):
    """Prompts alone, one a line of a UTF-8 text file."""

    path: Path
    """The file; blank lines in it are skipped."""

    def examples(self) -> Iterator[Example]:
        """All lines in order."""
        if not self.path.is_file():
            raise DataError(f"{self.path} does not exist or is not a file: `path` must name a text file")
        try:
            prompts = lines(self.path.read_text("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path} is not UTF-8 text ({error})") from None
        if not prompts:
            raise DataError(f"{self.path} is empty: expected one prompt a line")
        yield from map(Example, prompts)


def lines(text: str) -> list[str]:
    """Those that are not blank; a line ends at its newline and at no other of Unicode's separators."""
    return [line.strip() for line in text.split("\n") if line.strip()]


def prompts(path: Path) -> Source:
    """The source that reads a file of prompts: `Text` for .txt, `Jsonl` for anything else."""
    return Text(path) if path.suffix.lower() == ".txt" else Jsonl(path)
