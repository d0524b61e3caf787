"""Writes results for other programs and other people: as CSV, and as Markdown."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence

from corefit.run.report.results import Row
from corefit.run.report.seeds import SeedsRow
from corefit.run.report.table import MISSING, Numbers, gain_columns, names, one_seed, over_columns, title

MARKUP = re.compile(r"([\\`*<|\[])")
"""Characters by which Markdown would take a name for something else."""


def csv_text(rows: Sequence[Row | SeedsRow], keys: Sequence[str] = tuple(Row.__annotations__)) -> str:
    """Return a line for each row, under a line with the names of all keys; a key that a row lacks is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown(rows: Sequence[Row | SeedsRow]) -> str:
    """Return a table for each metric, with the numbers of the printed one: a line a stage, a column a category."""
    tables = [[row for row in rows if row["metric"] == metric] for metric in names(rows, "metric")]
    return "\n\n".join("\n".join(_table(of_metric)) for of_metric in tables) + "\n" if tables else ""


def _table(rows: Sequence[Row | SeedsRow]) -> Iterator[str]:
    """Yield the title and the lines of the table of one metric."""
    numbers, categories = Numbers.of(rows), names(rows, "category")
    gains, over = gain_columns({row["stage"]: row.get("start", "") for row in rows}), over_columns(rows)
    seeds = ["seeds"] if any("seeds" in row for row in rows) else []
    metric = rows[0]["metric"]
    yield f"**{text(metric)}**{title(rows).removeprefix(metric)}\n"
    yield line(["stage", *seeds, *categories, *gains, *over])
    yield f"|---|{'---:|' * len([*seeds, *categories, *gains, *over])}"
    for stage in names(rows, "stage"):
        found = {row["category"]: row for row in rows if row["stage"] == stage}
        values = [cell(*numbers.value(found[each])) if each in found else "" for each in categories]
        row = next(iter(found.values()))
        cells = [cell(*numbers.gain(row))]
        if len(gains) > 1:
            cells = [row.get("start", MISSING), *cells, cell(*numbers.gain(row, "base_gain"))]
        cells += [cell(*numbers.gain(row, "over_gain"))] if over else []
        yield line([stage, *([str(row.get("seeds", MISSING))] if seeds else []), *values, *cells])
    if note := one_seed(rows):
        yield f"\n{text(note)}"


def cell(main: str, interval: str) -> str:
    """Return a number with its interval, if it has one."""
    return f"{main} ({interval})" if interval else main


def line(cells: Sequence[str]) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(map(text, cells))} |"


def text(name: str) -> str:
    """Return a name as Markdown shows it unchanged, in one line."""
    return MARKUP.sub(r"\\\1", " ".join(name.split()))
