"""Writes results for other programs and other people: as CSV, and as Markdown."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from corefit.run.report.results import Row
from corefit.run.report.table import Numbers, names

MARKUP = re.compile(r"([\\`*<|\[])")
"""Characters by which Markdown would take a name for something else."""


def csv_text(rows: Sequence[Row]) -> str:
    """Return a line for each row, under a line with the names of all keys; a key that a row lacks is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Row.__annotations__), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown(rows: Sequence[Row]) -> str:
    """Return a table for each metric, with the numbers of the printed one: a line a stage, a column a category."""
    tables = [[row for row in rows if row["metric"] == metric] for metric in names(rows, "metric")]
    return "\n\n".join("\n".join(_table(of_metric)) for of_metric in tables) + "\n" if tables else ""


def _table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the title and the lines of the table of one metric."""
    numbers, categories = Numbers.of(rows), names(rows, "category")
    branched = _branches(rows)
    gains = ["starts from", "gain over it", "gain over base"] if branched else ["paired gain"]
    yield f"**{_text(rows[0]['metric'])}**, {rows[0]['n']} held-out prompts, 95 % intervals\n"
    yield _line(["stage", *categories, *gains])
    yield f"|---|{'---:|' * (len(categories) + len(gains))}"
    for stage in names(rows, "stage"):
        found = {row["category"]: row for row in rows if row["stage"] == stage}
        values = [_cell(*numbers.value(found[each])) if each in found else "" for each in categories]
        row = next(iter(found.values()))
        over = [_cell(*numbers.gain(row))]
        if branched:
            over = [row.get("start", "-"), *over, _cell(*numbers.gain(row, "base_gain"))]
        yield _line([stage, *values, *over])


def _branches(rows: Sequence[Row]) -> bool:
    """Return whether a stage starts from another one than that in the line above it."""
    starts = {row["stage"]: row.get("start", "") for row in rows}
    return any(starts[now] not in ("", before) for before, now in pairwise(starts))


def _cell(main: str, interval: str) -> str:
    return f"{main} ({interval})" if interval else main


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_text, cells))} |"


def _text(name: str) -> str:
    """Return a name as Markdown shows it unchanged, in one line."""
    return MARKUP.sub(r"\\\1", " ".join(name.split()))
