"""Results of several seeds of training: means over seeds and prompts, and gains paired in both, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NotRequired, cast

import numpy as np
from attrs import field, frozen
from numpy.typing import NDArray

from corefit.errors import DataError
from corefit.run.report import crossed, intervals
from corefit.run.report.intervals import Floats
from corefit.run.report.results import Row, groups_of, kind_of

EXAMPLES = "training examples"
"""What the exposure-bias meter is measured on, where other metrics have held-out prompts."""
Columns = Mapping[int, Sequence[float]]
"""Seed -> one value for each prompt."""


class SeedsRow(Row):
    """One entry of results.json, as for a single run, and the seeds from which each number is.

    seeds       number of seeds; the base, which is not trained, has none
    each        the value of every seed, by the seed
    of          what the metric was measured on, where that is not the held-out prompts
    over        the stage that `over_gain` is over
    gain_seeds  number of seeds that both have, a stage and what it starts from; likewise for the other gains
    """

    seeds: NotRequired[int]
    each: NotRequired[dict[str, float]]
    of: NotRequired[str]
    gain_seeds: NotRequired[int]
    base_gain_seeds: NotRequired[int]
    over: NotRequired[str]
    over_gain: NotRequired[float]
    over_gain_low: NotRequired[float]
    over_gain_high: NotRequired[float]
    over_gain_seeds: NotRequired[int]


@frozen(eq=False)
class Metric:
    """The values of one metric, by stage and seed, the base first.

    prompts     of what it is measured on; equal ones are one cluster
    categories  one for each prompt, or empty
    unit        that of the metric's reward; None if it is not known
    of          as in SeedsRow, or ""
    """

    name: str
    values: Mapping[str, Columns]
    prompts: Sequence[str]
    categories: Sequence[str] = ()
    unit: str | None = ""
    of: str = ""


@frozen(eq=False)
class Compared:
    """The stages by name in the order of their rows, with what each starts from, "" for the base; and `over`."""

    starts: Mapping[str, str]
    metrics: Sequence[Metric]
    over: str = field(default="")

    @property
    def base(self) -> str:
        return next(iter(self.starts))


def seeds_rows(compared: Compared) -> list[SeedsRow]:
    """Return rows by stage, metric and category, as `results` does; a stage without values of a metric has none of it.

    Raises DataError for a value that is not finite.
    """
    tables = [_Table.of(metric) for metric in compared.metrics]
    return [
        _row(compared, stage, table, category, rows)
        for stage in compared.starts
        for table in tables
        if stage in table.values
        for category, rows in table.groups.items()
    ]


@frozen(eq=False)
class _Table:
    """A metric with its values as arrays, stage -> seed -> [n]."""

    metric: Metric
    values: Mapping[str, Mapping[int, Floats]]
    kind: intervals.Kind
    clusters: intervals.Labels
    groups: Mapping[str, NDArray[np.intp]]

    @staticmethod
    def of(metric: Metric) -> _Table:
        values = {
            stage: {seed: _finite(metric, stage, seed, columns[seed]) for seed in sorted(columns)}
            for stage, columns in metric.values.items()
            if columns
        }
        every = np.stack([column for columns in values.values() for column in columns.values()])
        groups = groups_of(metric.categories, len(metric.prompts))
        return _Table(metric, values, kind_of(metric.unit or "", every), intervals.labels(metric.prompts), groups)


def _finite(metric: Metric, stage: str, seed: int, column: Sequence[float]) -> Floats:
    found = np.asarray(column, np.float64)
    if not np.isfinite(found).all():
        raise DataError(f"stage {stage!r} of seed {seed}: metric {metric.name!r} has values that are not finite")
    return found


def _row(compared: Compared, stage: str, table: _Table, category: str, rows: NDArray[np.intp]) -> SeedsRow:
    """Return the row of a stage on the prompts `rows`."""
    metric, columns, start = table.metric, table.values[stage], compared.starts[stage]
    now, clusters = _stacked(columns, rows), table.clusters[rows]
    if not start and (now == now[0]).all():  # the base is evaluated in every run, and is always the same
        now = now[:1]
    row: dict[str, Any] = {"stage": stage, "metric": metric.name, "category": category}
    row |= {} if metric.unit is None else {"unit": metric.unit}
    row |= {"value": float(now.mean()), "n": len(rows)} | _ends("", crossed.of_mean(now, clusters, table.kind))
    if metric.of:
        row["of"] = metric.of
    if start:
        each = dict(zip(map(str, sorted(columns)), now.mean(1).tolist(), strict=True))
        row |= {"start": start, "seeds": len(now), "each": each}
    if compared.over:
        row["over"] = compared.over
    gains: dict[str, dict[str, Any]] = {}
    for key, other in _others(compared, stage):
        if other not in gains:  # many stages start from the base
            gains[other] = _gain(table, columns, other, rows)
        row |= {key + name: value for name, value in gains[other].items()}
    return cast(SeedsRow, {key: _digits(value) for key, value in row.items()})


def _gain(table: _Table, columns: Mapping[int, Floats], other: str, rows: NDArray[np.intp]) -> dict[str, Any]:
    """Return what `columns` gain over another stage, by how the keys end; nothing where they have no seed in common."""
    both = {seed: columns[seed] - before for seed, before in table.values.get(other, {}).items() if seed in columns}
    if not both:
        return {}
    gains = _stacked(both, rows)
    ends = _ends("_", crossed.of_gain(gains, table.clusters[rows], table.kind))
    return {"": float(gains.mean()), "_seeds": len(gains)} | ends


def _digits(value: Any) -> Any:
    """Return numbers with nine digits: processors differ in the last of sixteen, and files are to have equal bytes."""
    if isinstance(value, dict):
        return {key: _digits(each) for key, each in cast(dict[str, Any], value).items()}
    return (float(f"{value:.9g}") if abs(value) > 1e-12 else 0.0) if isinstance(value, float) else value


def _others(compared: Compared, stage: str) -> Iterator[tuple[str, str]]:
    """Yield the key of each gain of a stage, and the stage that it is over."""
    if start := compared.starts[stage]:
        yield "gain", start
        yield "base_gain", compared.base
    if compared.over not in ("", stage):
        yield "over_gain", compared.over


def _stacked(columns: Mapping[int, Floats], rows: NDArray[np.intp]) -> Floats:
    """Return the values of all seeds, in their order, on some prompts: [seeds, rows]."""
    return np.stack([columns[seed][rows] for seed in sorted(columns)])


def _ends(prefix: str, interval: intervals.Interval | None) -> dict[str, float]:
    return {f"{prefix}low": interval[0], f"{prefix}high": interval[1]} if interval else {}


# drift


@frozen(eq=False)
class Drifts:
    """What the exposure-bias meter measured: noise levels [levels], prompts, stage -> seed -> [examples, levels]."""

    sigmas: Sequence[float]
    prompts: Sequence[str]
    values: Mapping[str, Mapping[int, Sequence[Sequence[float]]]]

    def metrics(self) -> list[Metric]:
        """Return two numbers for each example: the drift's mean over the noise levels, and that at the last one."""

        def of(name: str, number: Any) -> Metric:
            values = {
                stage: {seed: number(np.array(found)).tolist() for seed, found in seeds.items()}
                for stage, seeds in self.values.items()
            }
            return Metric(name, values, self.prompts, of=EXAMPLES)

        return [of("drift", lambda found: found.mean(1)), of("drift, last level", lambda found: found[:, -1])]

    def curves(self, starts: Mapping[str, str]) -> list[dict[str, Any]]:
        """Return the curve of each stage: its means over seeds and examples, and the paired change since its start."""
        found: list[dict[str, Any]] = []
        levels = [
            _Table.of(Metric(f"drift at {sigma:.6g}", self._level(number), self.prompts))
            for number, sigma in enumerate(self.sigmas)
        ]
        for stage in starts:
            if stage in self.values:
                rows = [_row(Compared(starts, ()), stage, level, "all", level.groups["all"]) for level in levels]
                found.append(_curve(stage, self.sigmas, rows))
        return found

    def _level(self, number: int) -> dict[str, Columns]:
        return {
            stage: {seed: [example[number] for example in found] for seed, found in seeds.items()}
            for stage, seeds in self.values.items()
        }


def _curve(stage: str, sigmas: Sequence[float], rows: Sequence[SeedsRow]) -> dict[str, Any]:
    """Return the curve in the form of a run's drift.json, with the number of seeds."""
    first = rows[0]
    curve = {"stage": stage, "seeds": first.get("seeds", 0), "sigmas": [*sigmas], "n": first["n"]}
    columns = {"drift": "value", "low": "low", "high": "high"}
    if "gain" in first:
        columns |= {"change": "gain", "change_low": "gain_low", "change_high": "gain_high"}
    return curve | {name: [row.get(key) for row in rows] for name, key in columns.items()}
