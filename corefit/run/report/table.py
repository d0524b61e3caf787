"""Prints the table at the end of a run, and formats its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from attrs import frozen

from corefit.errors import plain
from corefit.system import memory

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from corefit.run.report.results import Row, Scores

MISSING = "-"


@frozen
class Numbers:
    """How the values of one metric are written: as percentages, or with as many `decimals` as their size needs.

    Only ASCII is used, so that every terminal can print the results.
    """

    percent: bool
    decimals: int = 1

    @staticmethod
    def of(rows: Sequence[Row]) -> Numbers:
        """Choose percentages if every value and interval is in [0, 1]."""
        seen = [row[key] for row in rows for key in ("value", "low", "high")]
        if all(0 <= value <= 1 for value in seen):
            return Numbers(percent=True)
        digits = math.floor(math.log10(max(abs(value) for value in seen)))
        return Numbers(percent=False, decimals=min(6, max(0, 2 - digits)))

    def value(self, row: Row) -> tuple[str, str]:
        """Return the value and its interval."""
        low, high = self._plain(row["low"]), self._plain(row["high"])
        unit, to = (" %", "-") if self.percent else ("", " to ")
        return self._plain(row["value"]) + unit, f"{low}{to}{high}"

    def gain(self, row: Row, over: Literal["gain", "base_gain"] = "gain") -> tuple[str, str]:
        """Return the gain over what the stage starts from, or over the base, and its interval; a dash if none."""
        gain, low, high = (row.get(f"{over}{end}") for end in ("", "_low", "_high"))
        if gain is None or low is None or high is None:
            return MISSING, ""
        between = f"{self._plain(low, '+')} to {self._plain(high, '+')}"
        return self._plain(gain, "+") + (" pp" if self.percent else ""), between

    def _plain(self, value: float, sign: str = "") -> str:
        rounded = round(100 * value if self.percent else value, self.decimals) + 0.0  # no "-0.0"
        return f"{rounded:{sign if rounded else ''}.{self.decimals}f}"


def direction(row: Row, over: Literal["gain", "base_gain"] = "gain") -> str:
    """Return "up" or "down" if the interval of the gain excludes 0, else ""."""
    return "up" if row.get(f"{over}_low", 0.0) > 0 else "down" if row.get(f"{over}_high", 0.0) < 0 else ""


def branches(stages: Sequence[Scores]) -> bool:
    """Return whether a stage starts from another one than that in the row above it, which tables then say."""
    return any(now.start not in ("", before.stage) for before, now in pairwise(stages))


def names(rows: Sequence[Row], key: Literal["stage", "metric", "category"]) -> list[str]:
    """Return the distinct stages, metrics or categories, in order."""
    return list(dict.fromkeys(row[key] for row in rows))


def print_table(stages: Sequence[Scores], rows: Sequence[Row], console: Console) -> None:
    """Print a table per metric, one row per stage; categories that are too many for the console get tables below."""
    from rich.text import Text

    for metric in names(rows, "metric"):
        of_metric = [row for row in rows if row["metric"] == metric]
        title = f"{metric}, {of_metric[0]['n']} held-out prompts, 95 % intervals"
        console.print(Text(plain(f"\n{title}\n"), "bold"))
        for table in _fitting(stages, of_metric, console):
            console.print(table)
            console.print()


def _fitting(stages: Sequence[Scores], rows: Sequence[Row], console: Console) -> list[Table]:
    """Return one table if the console is wide enough; else "all" with the costs, then the categories evenly split."""
    every, *others = names(rows, "category")
    whole = _table(stages, rows, [every, *others], costs=True)
    if not others or _width(console, whole) <= console.width:
        return [whole]
    alone = _width(console, _table(stages, rows, [], costs=False))
    widest = max(_width(console, _table(stages, rows, [c], costs=False)) for c in others) - alone
    count = math.ceil(len(others) / max(1, (console.width - alone) // widest))
    size = math.ceil(len(others) / count)
    starts = range(0, len(others), size)
    return [
        _table(stages, rows, [every], costs=True),
        *(_table(stages, rows, others[start : start + size], costs=False) for start in starts),
    ]


def _width(console: Console, table: Table) -> int:
    unlimited = console.options.update(width=10_000)
    return console.measure(table, options=unlimited).maximum


def _table(stages: Sequence[Scores], rows: Sequence[Row], columns: Sequence[str], costs: bool) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    numbers, lines = Numbers.of(rows), {(row["stage"], row["category"]): row for row in rows}
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    table.add_column("stage", no_wrap=True)
    for column in columns:
        table.add_column(Text(plain(column)), justify="right", no_wrap=True)
    rounded = costs and any(stage.survived is not None for stage in stages)
    branched = branches(stages)
    gains = ["starts from", "gain\nover it", "gain\nover base"] if branched else ["paired\ngain"]
    for cost in (*gains, "time", "samples\n/ s", "peak\nmemory") if costs else ():
        table.add_column(cost, justify="right", no_wrap=True)
    if rounded:
        table.add_column("update kept\nin bf16", justify="right", no_wrap=True)
    for stage in stages:
        cells = [_cell(*numbers.value(lines[stage.stage, c])) for c in columns]
        row = lines[stage.stage, "all"]
        gains = [Text(stage.start or MISSING), *_gains(row, numbers, "gain", "base_gain")] if branched else None
        gains = _gains(row, numbers, "gain") if gains is None else gains
        more = [*gains, *_costs(stage), *([Text(_share(stage.survived))] if rounded else [])] if costs else []
        table.add_row(Text(stage.stage, "bold"), *cells, *more)
    return table


def _share(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.1f} %"


def _gains(row: Row, numbers: Numbers, *over: Literal["gain", "base_gain"]) -> list[Text]:
    colors = {"up": "green", "down": "red", "": ""}
    return [_cell(*numbers.gain(row, each), colors[direction(row, each)]) for each in over]


def _costs(stage: Scores) -> list[Text]:
    from rich.text import Text

    speed = f"{stage.samples_per_second:.1f}" if stage.samples_per_second else MISSING
    return [Text(duration(stage.seconds)), Text(speed), Text(memory.size(stage.peak_memory))]


def _cell(main: str, below: str, style: str = "") -> Text:
    from rich.text import Text

    text = Text(main, style)
    return text.append(f"\n{below}", "dim") if below else text


def duration(seconds: float) -> str:
    """Return seconds as people write them: "4.2 s", "42 s", "3m 05s", "2h 07m"; a dash for 0."""
    whole = round(seconds)
    if not seconds:
        return MISSING
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02}m"
