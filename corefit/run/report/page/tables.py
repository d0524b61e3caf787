"""The results as the page shows them: a table for each metric, and bars with intervals for each category."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from corefit.run.report.page.verdict import Gain, base_of, gain_of
from corefit.run.report.results import Row
from corefit.run.report.table import Numbers, names

NARROW = 0.5
"""Bars start at 0 unless all intervals are above this share of the largest value; then points on a cut axis do."""


def tables(rows: Sequence[Row], starts: Mapping[str, str], colors: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return what page.html shows of each metric."""
    return [
        _table(metric, [row for row in rows if row["metric"] == metric], starts, colors)
        for metric in names(rows, "metric")
    ]


def _table(metric: str, rows: Sequence[Row], starts: Mapping[str, str], colors: Mapping[str, int]) -> dict[str, Any]:
    numbers, cells = Numbers.of(rows), {(row["stage"], row["category"]): row for row in rows}
    counts = {row["category"]: row["n"] for row in rows}
    stages = names(rows, "stage")
    lines = [
        {
            "stage": stage,
            "start": starts.get(stage, ""),
            "color": colors.get(stage, 0),
            "cells": [_cell(cells.get((stage, category)), numbers, starts) for category in counts],
        }
        for stage in stages
    ]
    return {"title": metric, "columns": list(counts.items()), "lines": lines, "bars": _bars(rows, numbers, colors)}


def _cell(row: Row | None, numbers: Numbers, starts: Mapping[str, str]) -> dict[str, Any] | None:
    if row is None:
        return None
    value, interval = numbers.value(row)
    return {"value": value, "interval": interval, "gains": list(_gains(row, numbers, starts))}


def _gains(row: Row, numbers: Numbers, starts: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yield the gain over what the stage starts from and, where that has a start of its own, the gain over the base."""
    gain = gain_of(row, numbers)
    if gain:
        yield _shown(gain, "")
    whole = gain_of(row, numbers, "base_gain")
    if whole and starts.get(starts.get(row["stage"], "")):
        base = base_of(row["stage"], starts).rpartition(": ")[2]  # without the run, which the line names
        yield _shown(whole, f"over {base}")


def _shown(gain: Gain, over: str) -> dict[str, str]:
    return {"over": over, "text": f"{gain.text}{gain.unit}", "interval": gain.interval, "direction": gain.direction}


def _bars(rows: Sequence[Row], numbers: Numbers, colors: Mapping[str, int]) -> dict[str, Any]:
    """Return the rows as places in percent of an axis that starts at 0 where that leaves differences visible."""
    lowest = min(min(row["value"], row.get("low", row["value"])) for row in rows)
    highest = max(max(row["value"], row.get("high", row["value"])) for row in rows)
    filled = lowest >= 0 and (numbers.percent or lowest < NARROW * highest)
    low = 0.0 if filled else lowest - 0.05 * (highest - lowest)
    high = highest if filled else highest + 0.05 * (highest - lowest)
    length = (high - low) or 1.0

    def at(value: float) -> float:
        return round(100 * (value - low) / length, 2)

    groups = [
        {
            "category": category,
            "bars": [
                {
                    "stage": row["stage"],
                    "color": colors.get(row["stage"], 0),
                    "at": at(row["value"]),
                    "interval": _interval(row, at),
                    "value": numbers.value(row)[0],
                    "text": "{} (95 % interval: {})".format(*numbers.value(row)),
                }
                for row in rows
                if row["category"] == category
            ],
        }
        for category in names(rows, "category")
    ]
    ends = [f"{end:.{numbers.decimals}f}" for end in (low, high)]
    return {"filled": filled, "low": ends[0], "high": ends[1], "groups": groups}


def _interval(row: Row, at: Callable[[float], float]) -> tuple[float, float] | None:
    """Return where an interval begins and how long it is, in percent of the axis; None where there is none."""
    if "low" not in row or "high" not in row:
        return None
    return at(row["low"]), round(at(row["high"]) - at(row["low"]), 2)
