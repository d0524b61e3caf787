"""Held-out results: means with 95 % intervals; gains over a stage's start and over the base, paired by prompt."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from corefit.errors import DataError
from corefit.rng import generator
from corefit.system.files import write_whole

Floats = NDArray[np.float64]
Interval = tuple[float, float]
Z = 1.959963984540054
"""The 97.5 % quantile of the standard normal."""


@frozen
class Scores:
    """The scores of one stage on the held-out prompts, and the cost of its training.

    start               name of the stage, or base, that it starts from; "" for the base, which starts from nothing
    values              metric -> one value per prompt; prompts and order are the same in every stage
    categories          one per prompt, or empty; "" and "all" mean no category besides "all"
    seconds             training time; 0 for the base
    samples_per_second  speed of training; 0 if unknown
    peak_memory         bytes; 0 if unknown
    survived            share of the update that rounding has left, None if nothing was rounded
    """

    stage: str
    values: Mapping[str, Sequence[float]]
    categories: Sequence[str] = ()
    seconds: float = 0.0
    samples_per_second: float = 0.0
    peak_memory: int = 0
    survived: float | None = None
    start: str = ""


class Row(TypedDict):
    """One entry of results.json; the base has no start and no gains, as nothing is before it.

    gain       over the stage, or base, that it starts from
    base_gain  over the base
    """

    stage: str
    start: NotRequired[str]
    metric: str
    category: str
    value: float
    low: float
    high: float
    n: int
    gain: NotRequired[float]
    gain_low: NotRequired[float]
    gain_high: NotRequired[float]
    base_gain: NotRequired[float]
    base_gain_low: NotRequired[float]
    base_gain_high: NotRequired[float]


KEYS = {"stage", "metric", "category", "value", "low", "high", "n"}


def results(stages: Sequence[Scores]) -> list[Row]:
    """Return rows by stage, metric and category: "all", then the others in the order of the prompts.

    Intervals are 95 %: Wilson's if all values of a metric are 0 or 1, otherwise the percentile bootstrap over the
    prompts. The interval of a gain is the percentile bootstrap of the mean of the paired differences. The bootstrap
    has a fixed seed. Raises DataError for a value that is not finite.
    """
    if not stages:
        return []
    table = {metric: _table(stages, metric) for metric in stages[0].values}
    groups = _groups(stages)
    return [
        _row(stage, metric, category, {name: v[rows] for name, v in values.items()}, _binary(values))
        for stage in stages
        for metric, values in table.items()
        for category, rows in groups.items()
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


def wilson(successes: float, n: int) -> Interval:
    """Return the 95 % score interval of a proportion (Wilson, 1927)."""
    p, z2 = successes / n, Z * Z / n
    center = (p + z2 / 2) / (1 + z2)
    half = Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n)) / (1 + z2)
    return max(0.0, min(p, center - half)), min(1.0, max(p, center + half))


def bootstrap(values: Floats, resamples: int = 2000) -> Interval:
    """Return the 95 % percentile bootstrap interval of the mean of `values` [n], by resamples of a fixed seed."""
    draw, n = generator("report", "bootstrap"), len(values)
    block = max(1, 2**20 // n)  # resamples at once, to limit memory
    sizes = [min(block, resamples - done) for done in range(0, resamples, block)]
    means = [values[draw.integers(0, n, (size, n))].mean(1) for size in sizes]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def _row(stage: Scores, metric: str, category: str, values: Mapping[str, Floats], binary: bool) -> Row:
    """Return the row of a stage; `values` are those of every stage by name, the base first, [n] each."""
    now, base = values[stage.stage], next(iter(values.values()))
    low, high = wilson(float(now.sum()), len(now)) if binary else bootstrap(now)
    value = float(now.mean())
    row = Row(stage=stage.stage, metric=metric, category=category, value=value, low=low, high=high, n=len(now))
    if stage.start:
        row["start"] = stage.start
        row["gain"], (row["gain_low"], row["gain_high"]) = _gain(now, values[stage.start])
        row["base_gain"], (row["base_gain_low"], row["base_gain_high"]) = _gain(now, base)
    return row


def _gain(now: Floats, before: Floats) -> tuple[float, Interval]:
    """Return the mean of the paired differences and its interval."""
    differences = now - before
    return float(differences.mean()), bootstrap(differences)


def _table(stages: Sequence[Scores], metric: str) -> dict[str, Floats]:
    """Return the values of one metric by stage, [prompts] each, after a check that they are finite."""
    assert all(stage.values.keys() == stages[0].values.keys() for stage in stages), "metrics differ"
    values = [np.asarray(stage.values[metric], np.float64) for stage in stages]
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


def _groups(stages: Sequence[Scores]) -> dict[str, NDArray[np.intp]]:
    """Return category -> the numbers of its prompts."""
    names = list(stages[0].categories)
    n = len(next(iter(stages[0].values.values()), ()))
    assert all(list(stage.categories) == names for stage in stages), "categories differ between stages"
    assert len(names) in (0, n), "one category a prompt"
    named = [name for name in dict.fromkeys(names) if name not in ("", "all")]
    return {"all": np.arange(n)} | {c: np.flatnonzero([name == c for name in names]) for c in named}


def _binary(values: Mapping[str, Floats]) -> bool:
    return all(np.isin(v, (0.0, 1.0)).all() for v in values.values())
