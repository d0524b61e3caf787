"""Held-out results: means with 95 % intervals; gains over a stage's start and over the base, paired by prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
from attrs import field, frozen
from numpy.typing import NDArray

from corefit.errors import DataError
from corefit.run.report import intervals
from corefit.run.report.intervals import Floats
from corefit.system.files import write_whole

BLOCKS = ("diversity", "also")
"""Keys of scores.json that hold metrics with rows of their own: {"rows": [n], "values": metric -> [n]}."""


@frozen
class Block:
    """Metrics that were measured on some of the held-out prompts.

    rows    numbers of these prompts
    values  metric -> one value for each of `rows`
    """

    rows: Sequence[int]
    values: Mapping[str, Sequence[float]]


def blocks_of(scored: Mapping[str, Any]) -> tuple[Block, ...]:
    """Return the blocks in the content of scores.json; one that it lacks has no rows and no values."""
    found: list[Mapping[str, Any]] = [scored.get(key) or {"rows": (), "values": {}} for key in BLOCKS]
    return tuple(Block(block["rows"], block["values"]) for block in found)


def unit_of(metric: str, units: Mapping[str, str]) -> str | None:
    """Return the unit of a metric: that of its reward, which "ocr, 6 steps" has at the front of its name; or None."""
    if metric in units:
        return units[metric]
    return next((unit for name, unit in units.items() if metric.startswith(f"{name}, ")), None)


@frozen
class Scores:
    """The scores of one stage on the held-out prompts, and the cost of its training.

    start               name of the stage, or base, that it starts from; "" for the base, which starts from nothing
    values              metric -> one value per prompt; prompts and order are the same in every stage
    categories          one per prompt, or empty; "" and "all" mean no category besides "all"
    prompts             the prompts, or empty if all differ; equal ones are one cluster
    units               metric -> its reward's unit; "" is left out
    blocks              metrics with rows of their own, such as those of diversity
    seconds             training time; 0 for the base
    samples_per_second  speed of training; 0 if unknown
    peak_memory         bytes; 0 if unknown
    survived            share of the update that rounding has left, None if nothing was rounded
    steps, samples      what it was trained on; 0 if unknown, as in the table of one run, which does not show them
    """

    stage: str
    values: Mapping[str, Sequence[float]]
    categories: Sequence[str] = ()
    prompts: Sequence[str] = ()
    units: Mapping[str, str] = field(factory=dict[str, str])
    blocks: Sequence[Block] = ()
    seconds: float = 0.0
    samples_per_second: float = 0.0
    peak_memory: int = 0
    survived: float | None = None
    steps: float = 0.0
    samples: float = 0.0
    start: str = ""


class Row(TypedDict):
    """One entry of results.json; the base has no start and no gains, as nothing is before it.

    An interval is left out where nothing is known of the spread of the values; `intervals` says when.

    unit       that of the metric's reward, "share" or ""; files of version 0.1 have none
    gain       over the stage, or base, that it starts from
    base_gain  over the base
    """

    stage: str
    start: NotRequired[str]
    metric: str
    category: str
    unit: NotRequired[str]
    value: float
    low: NotRequired[float]
    high: NotRequired[float]
    n: int
    gain: NotRequired[float]
    gain_low: NotRequired[float]
    gain_high: NotRequired[float]
    base_gain: NotRequired[float]
    base_gain_low: NotRequired[float]
    base_gain_high: NotRequired[float]


SHARE = "share"
"""The unit of a metric that is a share from 0 to 1."""
KEYS = {"stage", "metric", "category", "value", "n"}


def results(stages: Sequence[Scores]) -> list[Row]:
    """Return rows by stage, metric and category: "all", then the others in the order of the prompts.

    Intervals are 95 %, clustered by prompt; `intervals` says how they are computed. Raises DataError for a value that
    is not finite.
    """
    tables = list(_tables(stages)) if stages else []
    return [
        _row(stage, table, category, rows)
        for stage in stages
        for table in tables
        for category, rows in table.groups.items()
    ]


def write_results(path: Path, rows: Sequence[Row]) -> None:
    """Replace results.json as a whole."""
    write_whole(path, (json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_results(path: Path) -> list[Row]:
    """Read what `write_results` wrote. Raises DataError for anything else."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); run the pipeline again, which writes it anew") from error
    listed = cast(list[Row], rows) if isinstance(rows, list) else [None]
    found = [row for row in listed if isinstance(row, dict) and row.keys() >= KEYS]
    if len(found) < len(listed):
        raise DataError(f"{path}: not a list of results; run the pipeline again, which writes it anew")
    return found


@frozen(eq=False)
class _Table:
    """The values of one metric by stage, the base first, [prompts] each; and the numbers of each category's prompts."""

    metric: str
    unit: str
    kind: intervals.Kind
    values: Mapping[str, Floats]
    clusters: intervals.Labels
    groups: Mapping[str, NDArray[np.intp]]


def _tables(stages: Sequence[Scores]) -> Iterator[_Table]:
    first = stages[0]
    n = len(next(iter(first.values.values()), first.prompts))
    assert all([*stage.categories] == [*first.categories] for stage in stages), "categories differ between stages"
    for blocks in zip(*([Block(range(n), stage.values), *stage.blocks] for stage in stages), strict=True):
        rows, columns = np.array(blocks[0].rows, np.intp), [block.values for block in blocks]
        assert all(each.keys() == columns[0].keys() for each in columns), "metrics differ"
        assert not columns[0] or all([*block.rows] == [*blocks[0].rows] for block in blocks), "different prompts"
        prompts = [first.prompts[int(row)] if first.prompts else str(row) for row in rows]
        for metric in columns[0]:
            values = _values(stages, metric, [each[metric] for each in columns])
            unit = unit_of(metric, first.units) or ""
            names = [first.categories[int(row)] for row in rows] if first.categories else []
            clusters, groups = intervals.labels(prompts), groups_of(names, len(rows))
            yield _Table(metric, unit, kind_of(unit, np.stack([*values.values()])), values, clusters, groups)


def kind_of(unit: str, values: Floats) -> intervals.Kind:
    """Return the kind of a metric's values: those of an undeclared unit are binary if both 0 and 1 occur, no others."""
    if bool(np.isin(values, (0.0, 1.0)).all()) and (unit == SHARE or np.ptp(values) > 0):
        return "binary"
    within = bool((values >= 0).all() and (values <= 1).all())
    return "share" if unit == SHARE and within else "unbounded"


def _row(stage: Scores, table: _Table, category: str, rows: NDArray[np.intp]) -> Row:
    """Return the row of a stage on the prompts `rows`."""
    values, clusters = {name: found[rows] for name, found in table.values.items()}, table.clusters[rows]
    now, base = values[stage.stage], next(iter(values.values()))
    row = Row(stage=stage.stage, metric=table.metric, category=category, unit=table.unit, value=_mean(now), n=len(now))
    if interval := intervals.of_mean(now, clusters, table.kind):
        row["low"], row["high"] = interval
    if stage.start:
        row["start"] = stage.start
        before = values[stage.start]
        row["gain"], row["base_gain"] = _mean(now - before), _mean(now - base)
        if interval := intervals.of_gain(now - before, clusters, table.kind):
            row["gain_low"], row["gain_high"] = interval
        if interval := intervals.of_gain(now - base, clusters, table.kind):
            row["base_gain_low"], row["base_gain_high"] = interval
    return row


def _mean(values: Floats) -> float:
    return float(values.mean())


def _values(stages: Sequence[Scores], metric: str, columns: Sequence[Sequence[float]]) -> dict[str, Floats]:
    """Return the values of one metric by stage, [prompts] each, after a check that they are finite."""
    values = [np.asarray(column, np.float64) for column in columns]
    assert {v.shape for v in values} == {(len(values[0]),)}, "stages were scored on different prompts"
    if not len(values[0]):
        raise DataError("no held-out prompts were scored; give [eval] prompts")
    for stage, v in zip(stages, values, strict=True):
        bad = np.flatnonzero(~np.isfinite(v))
        if len(bad):
            raise DataError(
                f"stage {stage.stage!r}: metric {metric!r} is {v[bad[0]]} for held-out prompt {bad[0]} "
                f"(of {len(bad)} such); a reward must raise or return a number"
            )
    return {stage.stage: v for stage, v in zip(stages, values, strict=True)}


def groups_of(categories: Sequence[str], count: int) -> dict[str, NDArray[np.intp]]:
    """Return category -> the numbers of its prompts, of `count`, whose categories are given, or none."""
    named = [name for name in dict.fromkeys(categories) if name not in ("", "all")]
    return {"all": np.arange(count)} | {c: np.flatnonzero([name == c for name in categories]) for c in named}
