"""The curves of a page: the metrics of all stages on one time axis, and the drift over the noise level."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from corefit.run.report.page.folder import RunFolder, StageFiles
from corefit.run.report.page.memo import Memo

MOST = 800
"""Points of a curve; longer ones are averaged down."""
IMPORTANT = (r"reward", r"reward/.*", r"held_out/.*", r"loss", r"grad_norm")
"""Metrics that are shown at once, in this order; the others are folded."""
CLOCK = ("step", "seconds")


def curves(runs: Sequence[RunFolder], memo: Memo) -> dict[str, Any] | None:
    """Return the metrics of all stages; x is the training time added up along the stages that led to each.

    Where an older version of corefit wrote no seconds, x is the number of steps. None if no step was logged.
    """
    stages = [stage for run in runs for stage in run.stages if stage.metrics]
    if not stages:
        return None
    timed = all(type(line.get("seconds")) in (int, float) for stage in stages for line in stage.metrics)
    clock = "seconds" if timed else "step"
    found = {
        stage.key: memo.of(("curve", clock, before), [stage.log], lambda s=stage, b=before: _curve(s, clock, b))
        for run in runs
        for stage, before in _with_offsets(run.stages, clock)
        if stage.metrics
    }
    every = list(dict.fromkeys(name for of in found.values() for name in of["y"]))
    first = [name for pattern in IMPORTANT for name in every if re.fullmatch(pattern, name)]
    alarms = [[at, stage.label] for stage in stages for at in found[stage.key]["alarms"]]
    return {
        "unit": "time" if timed else "step",
        "stages": {key: {"x": of["x"], "y": of["y"]} for key, of in found.items()},
        "first": first,
        "rest": [name for name in every if name not in first],
        "alarms": alarms,
        "longest": max(of["x"][-1] for of in found.values()),
        "bad": _not_finite(stages),
    }


def alarm_steps(stage: StageFiles) -> list[int]:
    """Return the steps at which the alarm of the held-out rewards sounded."""
    return [line["step"] for line in stage.metrics if line.get("alarm")]


def drift(stages: Sequence[StageFiles]) -> dict[str, dict[str, list[float]]]:
    """Return stage -> its exposure-bias curve: sigmas, drift, low and high, each [n], by rising sigma."""
    found: dict[str, dict[str, list[float]]] = {}
    for stage in stages:
        lists = [stage.drift.get(key) for key in ("sigmas", "drift", "low", "high")]
        if (
            all(isinstance(each, list) and each and all(map(_finite, each)) for each in lists)
            and len({len(each or ()) for each in lists}) == 1
        ):
            by_sigma = sorted(zip(*(each or () for each in lists), strict=True))
            columns = [list(column) for column in zip(*by_sigma, strict=True)]
            found[stage.key] = dict(zip(("sigmas", "drift", "low", "high"), columns, strict=True))
    return found


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _with_offsets(stages: Sequence[StageFiles], clock: str) -> Iterator[tuple[StageFiles, float]]:
    """Yield each stage with the time that all stages before it on its own path took."""
    ends = {"": 0.0}
    for stage in stages:
        before = ends.get(stage.start, 0.0)
        ends[stage.name] = before + (float(stage.metrics[-1].get(clock, 0)) if stage.metrics else 0.0)
        yield stage, before


def _curve(stage: StageFiles, clock: str, before: float) -> dict[str, Any]:
    lines = stage.metrics
    names = dict.fromkeys(name for line in lines for name in line if name not in (*CLOCK, "alarm"))
    x = _averaged(np.asarray([line[clock] for line in lines], np.float64) + before)
    y = {name: _averaged(_column(lines, name)) for name in names}
    return {
        "x": _listed(x, 7),
        "y": {name: _listed(values, 5) for name, values in y.items()},
        "alarms": [before + line[clock] for line in lines if line.get("alarm")],
    }


def _column(lines: Sequence[Mapping[str, Any]], name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return one metric [n]; NaN where a line has none, or one that is not finite."""
    return np.asarray([v if _finite(v := line.get(name)) else math.nan for line in lines], np.float64)


def _averaged(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return at most MOST means over neighbors, without what is not finite."""
    each = -(-len(values) // MOST)
    if each == 1:
        return values
    padded = np.full(-(-len(values) // each) * each, math.nan)
    padded[: len(values)] = values
    rows, known = padded.reshape(len(padded) // each, each), np.isfinite(padded).reshape(len(padded) // each, each)
    counts = known.sum(1)
    return np.divide(np.where(known, rows, 0).sum(1), counts, out=np.full(len(rows), math.nan), where=counts > 0)


def _listed(values: np.ndarray[Any, np.dtype[np.float64]], digits: int) -> list[float | None]:
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values.tolist()]


def _not_finite(stages: Sequence[StageFiles]) -> dict[str, str]:
    """Return metric -> how many of its logged values are not finite, which metrics.jsonl has as null."""
    counts: dict[str, int] = {}
    for stage in stages:
        for line in stage.metrics:
            for name, value in line.items():
                counts[name] = counts.get(name, 0) + (value is None)
    return {name: f"{count} not finite" for name, count in counts.items() if count}
