"""Source: prompts in a text file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

from corefit.errors import DataError
from corefit.types import Example, Source


@frozen
class Text(Source):
    """Reads prompts without media from a UTF-8 text file, one from each line."""

    path: Path
    """The text file; blank lines are skipped."""

    def examples(self) -> Iterator[Example]:
        """Yield an example for each line, in order."""
        if not self.path.is_file():
            raise DataError(f"{self.path} does not exist or is not a file: `path` must name a text file")
        try:
            prompts = nonblank_lines(self.path.read_text("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path} is not UTF-8 text ({error})") from None
        if not prompts:
            raise DataError(f"{self.path} is empty: expected one prompt a line")
        yield from map(Example, prompts)


@frozen
class Listed(Source):
    """Prompts that the pipeline file lists itself."""

    prompts: tuple[str, ...]

    def examples(self) -> Iterator[Example]:
        """Yield an example for each prompt, in order."""
        yield from map(Example, self.prompts)


def nonblank_lines(text: str) -> list[str]:
    """Return the lines that are not blank; only a newline ends a line, and no other of Unicode's separators."""
    return [line.strip() for line in text.split("\n") if line.strip()]
