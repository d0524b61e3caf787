"""Reads files of prompts in the forms in which benchmarks publish them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from attrs import frozen

from corefit.data.sources.jsonl import Jsonl
from corefit.data.sources.text import Text
from corefit.errors import DataError
from corefit.types import Example, Meta, Source

COLUMNS = ("prompt", "prompts", "text", "caption")
"""Names of the column that holds the prompts, in any case."""


@frozen
class PromptTable(Source):
    """Reads prompts from a table with a header, as DrawBench (.csv) and PartiPrompts (.tsv) are published.

    The other columns become metadata under their names in lower case, so that a column Category gives categories.
    """

    path: Path

    def examples(self) -> Iterator[Example]:
        """Yield an example for each line whose prompt is not blank; DataError names the file and what is wrong."""
        dialect = "excel-tab" if self.path.suffix.lower() == ".tsv" else "excel"
        rows = csv.reader(io.StringIO(_text(self.path), newline=""), dialect)
        names = [name.strip().lower() for name in next(rows, [])]
        column = next((name for name in COLUMNS if name in names), None)
        if column is None:
            raise DataError(
                f"{self.path}: the first line must name the columns, one of them {', '.join(COLUMNS)}; it has "
                f"{', '.join(map(repr, names)) or 'nothing'}"
            )
        found = False
        for row in rows:
            values = dict(zip(names, (value.strip() for value in row), strict=False))
            if prompt := values.pop(column, ""):
                found = True
                yield Example(prompt, meta=values)
        if not found:
            raise DataError(f"{self.path} has no prompt below its header; expected one a line")


@frozen
class PromptList(Source):
    """Reads prompts from a JSON list of texts, as the benchmark of HPSv2 is, or of objects with a `prompt`."""

    path: Path

    def examples(self) -> Iterator[Example]:
        """Yield an example for each entry; DataError names the file and the entry."""
        try:
            content: Any = json.loads(_text(self.path))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path} is not JSON ({error}); one object a line is read from .jsonl") from None
        if not isinstance(content, list) or not content:
            raise DataError(f'{self.path}: expected a list of prompts, such as ["a red bus"]')
        for number, entry in enumerate(cast(list[Any], content), 1):
            rest: dict[str, Any] = dict(entry) if isinstance(entry, dict) else {"prompt": entry}  # pyright: ignore[reportUnknownArgumentType]
            prompt = rest.pop("prompt", None)
            if not isinstance(prompt, str) or not prompt.strip():
                raise DataError(f"{self.path}: entry {number} is neither a text nor an object with a 'prompt'")
            yield Example(prompt, meta=rest)


READERS: Mapping[str, Callable[[Path], Source]] = {
    ".txt": Text,
    ".csv": PromptTable,
    ".tsv": PromptTable,
    ".json": PromptList,
}


def prompt_source(path: Path) -> Source:
    """Return the source that reads a file of prompts, by the ending of its name; `Jsonl` for any other.

    A prompt a line are DrawBench's and Flow-GRPO's .txt, among them its OCR prompts with the text in quotes; an object
    a line is GenEval's evaluation_metadata.jsonl.
    """
    return READERS.get(path.suffix.lower(), Jsonl)(path)


def category(meta: Meta) -> str:
    """Return a prompt's category: its `category`, or its `tag`, as GenEval calls it; "" where it has neither."""
    return str(meta.get("category", meta.get("tag", "")))


def _text(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file: name a file of prompts")
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; mend that and run again") from error
