"""Prints the table at the end of a run, and formats its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from attrs import frozen

from corefit.errors import counted, plain
from corefit.run.report.results import SHARE
from corefit.system import memory

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from corefit.run.report.results import Row, Scores
    from corefit.run.report.seeds import SeedsRow

    AnyRow = Row | SeedsRow
Over = Literal["gain", "base_gain", "over_gain"]

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
    def of(rows: Sequence[AnyRow]) -> Numbers:
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

    def value(self, row: AnyRow) -> tuple[str, str]:
        """Return the value and its interval."""
        unit, to = (" %", "-") if self.percent else ("", " to ")
        return self._plain(row["value"]) + unit, self._interval(row.get("low"), row.get("high"), to)

    def gain(self, row: AnyRow, over: Over = "gain") -> tuple[str, str]:
        """Return the gain over what the stage starts from, or over another one, and its interval; a dash if none.

        Where fewer seeds than the stage has are in the gain, their number is beside the interval.
        """
        gain, low, high, seeds = (row.get(f"{over}{end}") for end in ("", "_low", "_high", "_seeds"))
        if gain is None:
            return MISSING, ""
        fewer = f", {counted(seeds, 'seed')}" if seeds != row.get("seeds", seeds) and seeds else ""
        interval = self._interval(low, high, " to ", "+") + fewer
        return self._plain(gain, "+") + (" pp" if self.percent else ""), interval

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


def direction(row: AnyRow, numbers: Numbers, over: Over = "gain") -> str:
    """Return "up" or "down" if the interval of the gain, as it is printed, excludes 0, else ""."""
    low, high = (numbers.rounded(row.get(f"{over}_{end}", 0.0)) for end in ("low", "high"))
    return "up" if low > 0 else "down" if high < 0 else ""


def gain_columns(starts: Mapping[str, str]) -> list[str]:
    """Return the heads of a table's columns of gains, given stage -> what it starts from, in the order of the rows.

    Where each stage starts from that in the row above, or all from the base, one column holds its one gain; else there
    are three, the first of which names what it starts from.
    """
    base, *others = starts
    if len(others) > 1 and all(starts[stage] == base for stage in others):
        return [f"gain\nover {plain(base)}"]
    if any(starts[now] not in ("", before) for before, now in pairwise(starts)):
        return ["starts\nfrom", "gain\nover it", "gain\nover base"]
    return ["paired\ngain"]


def over_columns(rows: Sequence[AnyRow]) -> list[str]:
    """Return the head of the column of gains over a stage that was named, if one was."""
    over = next((row["over"] for row in rows if "over" in row), "")
    return [f"gain\nover {plain(over)}"] if over else []


def title(rows: Sequence[AnyRow]) -> str:
    """Return the title of the table of one metric."""
    first, seeds = rows[0], " over seeds and prompts" if any("seeds" in row for row in rows) else ""
    return f"{first['metric']}, {first['n']} {first.get('of', 'held-out prompts')}, 95 % intervals{seeds}"


def one_seed(rows: Sequence[AnyRow]) -> str:
    """Return what is to be said of stages that have one seed alone; "" if there are none."""
    alone = list(dict.fromkeys(row["stage"] for row in rows if row.get("seeds") == 1))
    return f"one seed: {', '.join(alone)}; these intervals are over prompts alone" if alone else ""


def names(rows: Sequence[AnyRow], key: Literal["stage", "metric", "category"]) -> list[str]:
    """Return the distinct stages, metrics or categories, in order."""
    return list(dict.fromkeys(row[key] for row in rows))


def print_table(stages: Sequence[Scores], rows: Sequence[AnyRow], console: Console, benchmark: str = "") -> None:
    """Print a table per metric, one row per stage that has it; categories that are too many get tables below.

    benchmark  the name of what was evaluated on, for the titles
    """
    from rich.text import Text

    seeded = any("seeds" in row for row in rows)
    for number, metric in enumerate(names(rows, "metric")):
        of_metric = [row for row in rows if row["metric"] == metric]
        console.print(Text(plain(f"\n{f'{benchmark}: ' if benchmark else ''}{title(of_metric)}\n"), "bold"))
        for table in _fitting(stages, of_metric, console, costs=not seeded or not number):  # many metrics: once
            console.print(table)
            console.print()
        if note := one_seed(of_metric):
            console.print(Text(plain(f"{note}\n")))


def _fitting(stages: Sequence[Scores], rows: Sequence[AnyRow], console: Console, *, costs: bool) -> list[Table]:
    """Return one table if the console is wide enough; else "all" with gains and costs, then the categories, split."""
    every, *others = names(rows, "category")
    whole = _table(stages, rows, [every, *others], gains=True, costs=costs)
    if _width(console, whole) <= console.width:
        return [whole]
    first = [_table(stages, rows, [every], gains=True, costs=costs)]
    if costs and _width(console, first[0]) > console.width:
        first = [_table(stages, rows, [every], gains=True), _table(stages, rows, [], costs=True)]
    if _width(console, first[0]) > console.width:
        first[:1] = [_table(stages, rows, [every]), _table(stages, rows, [], gains=True)]
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
    stages: Sequence[Scores],
    rows: Sequence[AnyRow],
    columns: Sequence[str],
    *,
    gains: bool = False,
    costs: bool = False,
) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    numbers, lines = Numbers.of(rows), {(row["stage"], row["category"]): row for row in rows}
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    table.add_column("stage", overflow="fold")
    seeded = any("seeds" in row for row in rows)
    gain_heads, over_heads = gain_columns({stage.stage: stage.start for stage in stages}), over_columns(rows)
    branched = len(gain_heads) > 1
    over: list[Over] = ["gain", *(["base_gain"] if branched else []), *(["over_gain"] if over_heads else [])]
    cost_heads, cost_cells = _cost_columns(stages) if costs and any(stage.seconds for stage in stages) else ([], {})
    heads = [*map(plain, columns), *([*gain_heads, *over_heads] if gains else []), *cost_heads]
    for head in (["seeds"] if seeded else []) + heads:
        named = head.startswith("starts")  # long names are broken, numbers never
        table.add_column(Text(head), justify="right", no_wrap=not named, overflow="fold" if named else "ellipsis")
    for stage in stages:
        if (row := lines.get((stage.stage, "all"))) is None:  # only some stages have been scored by a new metric
            continue
        cells = [Text(str(row.get("seeds", MISSING)))] if seeded else []
        cells += [_cell(*numbers.value(lines[stage.stage, c])) for c in columns]
        cells += [Text(stage.start or MISSING)] if gains and branched else []
        cells += gain_cells(row, numbers, over) if gains else []
        table.add_row(Text(stage.stage, "bold"), *cells, *cost_cells.get(stage.stage, []))
    return table


def gain_cells(row: AnyRow, numbers: Numbers, over: Sequence[Over]) -> list[Text]:
    """Return a cell for each gain, green if the stage is better; less drift is better."""
    colors = {"up": "green", "down": "red", "": ""}
    if "of" in row:
        colors = {"up": "red", "down": "green", "": ""}
    return [_cell(*numbers.gain(row, each), colors[direction(row, numbers, each)]) for each in over]


def _cost_columns(stages: Sequence[Scores]) -> tuple[list[str], dict[str, list[Text]]]:
    """Return the heads of what training took, as far as it is known of any stage, and the cells of each stage."""
    from rich.text import Text

    found = costs_of(stages)
    return [*found], {stage.stage: [Text(cells[i]) for cells in found.values()] for i, stage in enumerate(stages)}


def costs_of(stages: Sequence[Scores]) -> dict[str, list[str]]:
    """Return the columns of what training took, head -> a cell for each stage."""

    def number(value: float, digits: int = 0) -> str:
        return f"{value:.{digits}f}" if value else MISSING

    found = {
        "time": [duration(stage.seconds) for stage in stages],
        "samples\n/ s": [number(stage.samples_per_second, 1) for stage in stages],
        "peak\nmemory": [memory.size(stage.peak_memory) for stage in stages],
    }
    if any(stage.survived is not None for stage in stages):
        shares = [stage.survived for stage in stages]
        found["update kept\nin bf16"] = [MISSING if share is None else f"{100 * share:.1f} %" for share in shares]
    if any(stage.steps for stage in stages):
        found = {
            "steps": [number(stage.steps) for stage in stages],
            "samples": [number(stage.samples) for stage in stages],
            **found,
        }
    return found


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
