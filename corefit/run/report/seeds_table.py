"""What a comparison of several seeds adds to the tables of one run: seeds, costs, and gains over one stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from corefit.errors import plain
from corefit.run.report import export
from corefit.run.report.seeds import SeedsRow
from corefit.run.report.table import MISSING, Numbers, costs_of, gain_cells, names

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from corefit.run.report.results import Scores


def csv_text(rows: Sequence[SeedsRow]) -> str:
    """Return a line for each row with every key, except the values of the single seeds."""
    keys = [key for kind in reversed(SeedsRow.__mro__) for key in getattr(kind, "__annotations__", {})]
    return export.csv_text(rows, [key for key in keys if key != "each"])


def markdown(rows: Sequence[SeedsRow], costs: Sequence[Scores]) -> str:
    """Return the tables of `export.markdown`, the gains over one stage if there are any, and the costs."""
    parts = [export.markdown(rows).rstrip("\n"), "\n".join(_pairs(rows)), "\n".join(_costs(costs))]
    return "\n\n".join(part for part in parts if part) + "\n"


def print_pairs(rows: Sequence[SeedsRow], console: Console) -> None:
    """Print the gains over one stage, a column for each metric; those that are too wide follow below."""
    from rich.text import Text

    stages, metrics, numbers, found = _gains(rows)
    if not found:
        return
    console.print(Text(plain(f"\n{_title(rows)}\n"), "bold"))
    while metrics:
        count = next(
            (n for n in range(len(metrics), 1, -1) if _width(console, _table(stages, metrics[:n], numbers, found))), 1
        )
        console.print(_table(stages, metrics[:count], numbers, found))
        console.print()
        metrics = metrics[count:]


Found = dict[tuple[str, str], SeedsRow]


def _gains(rows: Sequence[SeedsRow]) -> tuple[list[str], list[str], dict[str, Numbers], Found]:
    """Return stages, metrics, how each metric is written, and the rows of all prompts that have such a gain."""
    every = [row for row in rows if row["category"] == "all" and "over_gain" in row]
    metrics = names(every, "metric")
    numbers = {metric: Numbers.of([row for row in rows if row["metric"] == metric]) for metric in metrics}
    return names(every, "stage"), metrics, numbers, {(row["stage"], row["metric"]): row for row in every}


def _title(rows: Sequence[SeedsRow]) -> str:
    return f"gains over {next(row['over'] for row in rows if 'over' in row)}, paired by seed and prompt, 95 % intervals"


def _width(console: Console, table: Table) -> bool:
    """Return whether a table fits."""
    return console.measure(table, options=console.options.update(width=10_000)).maximum <= console.width


def _table(stages: Sequence[str], metrics: Sequence[str], numbers: dict[str, Numbers], found: Found) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    table.add_column("stage", overflow="fold")
    for metric in metrics:
        table.add_column(Text(plain(metric.replace(", ", ",\n"))), justify="right", no_wrap=True)
    for stage in stages:
        cells = [
            gain_cells(row, numbers[metric], ["over_gain"])[0] if (row := found.get((stage, metric))) else Text(MISSING)
            for metric in metrics
        ]
        table.add_row(Text(stage, "bold"), *cells)
    return table


def _pairs(rows: Sequence[SeedsRow]) -> Iterator[str]:
    stages, metrics, numbers, found = _gains(rows)
    if not found:
        return
    yield f"**{export.text(_title(rows))}**\n"
    yield export.line(["stage", *metrics])
    yield f"|---|{'---:|' * len(metrics)}"
    for stage in stages:
        cells = [
            export.cell(*numbers[metric].gain(row, "over_gain")) if (row := found.get((stage, metric))) else MISSING
            for metric in metrics
        ]
        yield export.line([stage, *cells])


def _costs(costs: Sequence[Scores]) -> Iterator[str]:
    if not any(stage.seconds for stage in costs):
        return
    columns = costs_of(costs)
    yield "**costs**, means over seeds\n"
    yield export.line(["stage", *columns])
    yield f"|---|{'---:|' * len(columns)}"
    for stage, *cells in zip([stage.stage for stage in costs], *columns.values(), strict=True):
        yield export.line([stage, *cells])
