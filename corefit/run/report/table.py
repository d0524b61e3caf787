"""Prints the table at the end of a run, and formats its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from attrs import frozen

from corefit.errors import plain
from corefit.run.report.results import SHARE
from corefit.system import memory

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from corefit.run.report.results import Row, Scores

MISSING = "-"
UNKNOWN = "no interval"
"""Printed where values agree and have no bounds, so that nothing is known of their spread."""


@frozen
class Numbers:
    """How the values of one metric are written: as percentages, or with as many `decimals` as their size needs.

    Only ASCII is used, so that every terminal can print the results.
    """

    percent: bool
    decimals: int = 1

    @staticmethod
    def of(rows: Sequence[Row]) -> Numbers:
        """Choose percentages for shares; in files of version 0.1, which name no unit, if all numbers are in [0, 1]."""
        seen = [value for row in rows for key in ("value", "low", "high") if (value := row.get(key)) is not None]
        units = {row["unit"] for row in rows if "unit" in row}
        if SHARE in units or (not units and all(0 <= value <= 1 for value in seen)):
            return Numbers(percent=True)
        largest = max(abs(value) for value in seen)
        digits = math.floor(math.log10(largest)) if largest else 0
        return Numbers(percent=False, decimals=min(6, max(0, 2 - digits)))

    def value(self, row: Row) -> tuple[str, str]:
        """Return the value and its interval."""
        unit, to = (" %", "-") if self.percent else ("", " to ")
        return self._plain(row["value"]) + unit, self._interval(row.get("low"), row.get("high"), to)

    def gain(self, row: Row, over: Literal["gain", "base_gain"] = "gain") -> tuple[str, str]:
        """Return the gain over what the stage starts from, or over the base, and its interval; a dash if none."""
        gain, low, high = (row.get(f"{over}{end}") for end in ("", "_low", "_high"))
        if gain is None:
            return MISSING, ""
        return self._plain(gain, "+") + (" pp" if self.percent else ""), self._interval(low, high, " to ", "+")

    def rounded(self, value: float) -> float:
        """Return the number that is printed for a value: a percentage, or the value itself."""
        return round(100 * value if self.percent else value, self.decimals) + 0.0  # no "-0.0"

    def _interval(self, low: float | None, high: float | None, to: str, sign: str = "") -> str:
        if low is None or high is None:
            return UNKNOWN
        return f"{self._plain(low, sign)}{to}{self._plain(high, sign)}"

    def _plain(self, value: float, sign: str = "") -> str:
        rounded = self.rounded(value)
        return f"{rounded:{sign if rounded else ''}.{self.decimals}f}"


def direction(row: Row, numbers: Numbers, over: Literal["gain", "base_gain"] = "gain") -> str:
    """Return "up" or "down" if the interval of the gain, as it is printed, excludes 0, else ""."""
    low, high = (numbers.rounded(row.get(f"{over}_{end}", 0.0)) for end in ("low", "high"))
    return "up" if low > 0 else "down" if high < 0 else ""


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
    return [_cell(*numbers.gain(row, each), colors[direction(row, numbers, each)]) for each in over]


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
