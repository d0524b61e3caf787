"""Says in words what a run has achieved, from the rows of its results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import frozen
from markupsafe import Markup

from corefit.run.report.results import Row
from corefit.run.report.table import Numbers, names

DIVERSITY = ("vendi", "distance")
"""Metrics that tell how different the samples of one prompt are."""


@frozen
class Gain:
    """A gain and its interval, as they are said and shown; in points where the metric is a share."""

    value: float
    low: float
    high: float
    text: str
    """With its sign."""
    size: str
    """Without it."""
    interval: str
    unit: str

    @property
    def direction(self) -> str:
        """Return "up" or "down" where the interval excludes 0 by more than rounding, else ""."""
        return "up" if self.low > 0 else "down" if self.high < 0 else ""


def gain_of(row: Row, numbers: Numbers, key: str = "gain") -> Gain | None:
    """Return a row's gain over what its stage starts from, or with "base_gain" that over the base."""
    values: Mapping[str, Any] = row
    if any(name not in values for name in (key, f"{key}_low", f"{key}_high")):
        return None
    scale = 100 if numbers.percent else 1
    value, low, high = (
        round(scale * values[name], numbers.decimals) + 0.0 for name in (key, f"{key}_low", f"{key}_high")
    )
    low_text, high_text = f"{low:.{numbers.decimals}f}", f"{high:.{numbers.decimals}f}"
    if value < 0 and high < 0:  # said of a loss: its size
        low_text, high_text = high_text.lstrip("-"), low_text.lstrip("-")
    return Gain(
        value=value,
        low=low,
        high=high,
        text=f"{value:{'+' if value else ''}.{numbers.decimals}f}",
        size=f"{abs(value):.{numbers.decimals}f}",
        interval=f"{low_text} to {high_text}",
        unit=" points" if numbers.percent else "",
    )


def starts_of(rows: Sequence[Row]) -> dict[str, str]:
    """Return stage -> the stage that it starts from: what the row says, or else the stage before it."""
    found: dict[str, str] = {}
    before = ""
    for stage in names(rows, "stage"):
        row: Mapping[str, Any] = next(row for row in rows if row["stage"] == stage)
        found[stage] = str(row.get("start") or (before if "gain" in row else ""))
        before = stage
    return found


def verdict(rows: Sequence[Row], starts: Mapping[str, str]) -> list[Markup]:
    """Return a sentence for each metric, the quality before the diversity."""
    every = [row for row in rows if row["category"] == "all"]
    metrics = names(every, "metric")
    ordered = [m for m in metrics if m not in DIVERSITY] + [m for m in metrics if m in DIVERSITY]
    return [_of_metric(metric, [row for row in every if row["metric"] == metric], starts) for metric in ordered]


def _of_metric(metric: str, rows: Sequence[Row], starts: Mapping[str, str]) -> Markup:
    numbers = Numbers.of(rows)
    parts = list(_parts(rows, numbers, starts))
    value, interval = numbers.value(rows[0])
    if not parts:
        what = Markup("{} scores {} in {}").format(_strong(rows[0]["stage"]), value, metric)
        return what + Markup(" on {} held-out prompts (95 % interval {}); no stage has been evaluated yet.").format(
            rows[0]["n"], interval
        )
    return Markup("; ").join(parts) + _closing(metric, rows, numbers)


def _parts(rows: Sequence[Row], numbers: Numbers, starts: Mapping[str, str]) -> Iterator[Markup]:
    said, first = "", True
    for row in rows:
        gain, start = gain_of(row, numbers), starts.get(row["stage"], "")
        if gain is None:
            continue
        further = bool(said) and start == said
        yield _part(row["stage"], gain, start, further=further, first=first)
        said, first = row["stage"], False


def _part(stage: str, gain: Gain, start: str, *, further: bool, first: bool) -> Markup:
    interval = f"95 % interval {gain.interval}" if first else gain.interval
    over = "" if further else f" over {start}"
    if gain.direction == "up":
        text = Markup("{} gains {}{}{}{}") if not further else Markup("{} {}{}{}{}")
        size = f"a further {gain.size}" if further else gain.size
        return text.format(_strong(stage), size, gain.unit, over, _aside(interval, first))
    if gain.direction == "down":
        size = f"loses {gain.size}{gain.unit}{' again' if further else f' against {start}'}"
        return Markup("{} {}{}").format(_strong(stage), size, _aside(interval, first))
    return Markup("{} shows no sure change from {} ({}{}, {})").format(
        _strong(stage), start, gain.text, gain.unit, interval
    )


def _aside(interval: str, first: bool) -> str:
    return f", {interval}" if first else f" ({interval})"


def _closing(metric: str, rows: Sequence[Row], numbers: Numbers) -> Markup:
    """Return what is measured and on how much, and the value and the whole gain of the last stage, if it has one."""
    last, base = rows[-1], rows[0]
    whole = gain_of(last, numbers, "base_gain")
    ends = Markup(". In {}, on {} held-out prompts: {} {}").format(
        metric, last["n"], base["stage"], numbers.value(base)[0]
    )
    ends += Markup(", {} {}").format(last["stage"], numbers.value(last)[0])
    if whole and "start" in last and last["start"] != base["stage"]:
        ends += Markup(" ({}{} over {} in all)").format(whole.text, whole.unit, base["stage"])
    return ends + "."


def _strong(stage: str) -> Markup:
    return Markup("<b>{}</b>").format(stage)
