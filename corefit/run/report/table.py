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
    """How the values of one metric are written: as percentages, or with as many `decimals` as they need.

    That is three digits of the largest value, and four if two digits of the narrowest interval take them.

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
        ends = (("low", "high"), ("gain_low", "gain_high"), ("base_gain_low", "base_gain_high"))
        widths = [row[high] - row[low] for row in rows for low, high in ends if low in row and high in row]
        largest = _digits(max(abs(value) for value in seen))
        narrowest = _digits(min((width for width in widths if width), default=math.inf))
        return Numbers(percent=False, decimals=min(6, max(0, 2 - largest, min(1 - narrowest, 3 - largest))))

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


def _digits(value: float) -> int:
    """Return the exponent of the first digit: 0 for 5.4, -1 for 0.3."""
    return math.floor(math.log10(value)) if 0 < value < math.inf else 0


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


def print_table(stages: Sequence[Scores], rows: Sequence[Row], console: Console, benchmark: str = "") -> None:
    """Print a table per metric, one row per stage; categories that are too many for the console get tables below.

    benchmark  the name of what was evaluated on, for the titles
    """
    from rich.text import Text

    for metric in names(rows, "metric"):
        of_metric = [row for row in rows if row["metric"] == metric]
        title = f"{f'{benchmark}: ' if benchmark else ''}{metric}, {of_metric[0]['n']} held-out prompts, 95 % intervals"
        console.print(Text(plain(f"\n{title}\n"), "bold"))
        for table in _fitting(stages, of_metric, console):
            console.print(table)
            console.print()


def _fitting(stages: Sequence[Scores], rows: Sequence[Row], console: Console) -> list[Table]:
    """Return one table if the console is wide enough; else "all" with gains and costs, then the categories, split."""
    every, *others = names(rows, "category")
    whole = _table(stages, rows, [every, *others], gains=True, costs=True)
    if _width(console, whole) <= console.width:
        return [whole]
    first = [_table(stages, rows, [every], gains=True, costs=True)]
    if _width(console, first[0]) > console.width:
        first = [_table(stages, rows, [every], gains=True), _table(stages, rows, [], costs=True)]
    if not others:
        return first
    alone = _width(console, _table(stages, rows, []))
    widest = max(_width(console, _table(stages, rows, [c])) for c in others) - alone
    count = math.ceil(len(others) / max(1, (console.width - alone) // widest))
    size = math.ceil(len(others) / count)
    starts = range(0, len(others), size)
    return [*first, *(_table(stages, rows, others[start : start + size]) for start in starts)]


def _width(console: Console, table: Table) -> int:
    unlimited = console.options.update(width=10_000)
    return console.measure(table, options=unlimited).maximum


def _table(
    stages: Sequence[Scores], rows: Sequence[Row], columns: Sequence[str], *, gains: bool = False, costs: bool = False
) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    numbers, lines = Numbers.of(rows), {(row["stage"], row["category"]): row for row in rows}
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    table.add_column("stage", no_wrap=True)
    base, rounded = stages[0].stage, any(stage.survived is not None for stage in stages)
    star = len(stages) > 2 and all(stage.start == base for stage in stages[1:])
    branched = branches(stages) and not star  # otherwise each row has one gain
    gain_head = f"gain\nover {plain(base)}" if star else "paired\ngain"
    gain_heads = ["starts\nfrom", "gain\nover it", "gain\nover base"] if branched else [gain_head]
    costs = costs and any(stage.seconds for stage in stages)
    cost_heads = ["time", "samples\n/ s", "peak\nmemory", *(["update kept\nin bf16"] if rounded else [])]
    for head in (*map(plain, columns), *(gain_heads if gains else []), *(cost_heads if costs else [])):
        table.add_column(Text(head), justify="right", no_wrap=True)
    for stage in stages:
        cells = [_cell(*numbers.value(lines[stage.stage, c])) for c in columns]
        over = _gains(lines[stage.stage, "all"], numbers, *(("gain", "base_gain") if branched else ("gain",)))
        over = [*([Text(stage.start or MISSING)] if branched else []), *over]
        spent = [*_costs(stage), *([Text(_share(stage.survived))] if rounded else [])]
        table.add_row(Text(stage.stage, "bold"), *cells, *(over if gains else []), *(spent if costs else []))
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
