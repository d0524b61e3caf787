"""Says in words what a run has achieved, from the rows of its results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from attrs import frozen
from markupsafe import Markup, escape

from corefit.run.report.results import Row
from corefit.run.report.table import UNKNOWN, Numbers, direction, names

Over = Literal["gain", "base_gain"]
DIVERSITY = ("vendi", "distance")
"""Metrics that tell how different the samples of one prompt are."""


@frozen
class Gain:
    """A gain and its interval as a page says them; in points where the metric is a share."""

    text: str
    """With its sign."""
    size: str
    """Without it."""
    interval: str
    """With signs, such as "-0.2 to +6.6"; of a loss `size_interval` has none."""
    size_interval: str
    unit: str
    direction: str
    """ "up" or "down" where the interval excludes 0 by more than rounding, else ""."""


def gain_of(row: Row, numbers: Numbers, over: Over = "gain") -> Gain | None:
    """Return a row's gain over what its stage starts from, or over the base."""
    value = row.get(over)
    if value is None:
        return None
    text, interval = numbers.gain(row, over)
    shown = text.removesuffix(" pp")
    ends = interval.replace("+", "").split(" to ")
    ends = [end.lstrip("-") for end in reversed(ends)] if shown.startswith("-") else ends
    unit = " points" if numbers.percent else ""
    return Gain(shown, shown.lstrip("+-"), interval, " to ".join(ends), unit, direction(row, numbers, over))


def starts_of(rows: Sequence[Row]) -> dict[str, str]:
    """Return stage -> the stage that it starts from: what the row says, or else the stage before it."""
    found: dict[str, str] = {}
    before = ""
    for stage in names(rows, "stage"):
        row: Mapping[str, Any] = next(row for row in rows if row["stage"] == stage)
        found[stage] = str(row.get("start") or (before if "gain" in row else ""))
        before = stage
    return found


def base_of(stage: str, starts: Mapping[str, str]) -> str:
    """Return the base that a stage comes from, by way of other stages or not; several runs may have one each."""
    seen = {stage}
    while (start := starts.get(stage, "")) and start not in seen:
        seen.add(stage := start)
    return stage


@frozen
class Sentence:
    """What is said of one metric."""

    metric: str
    """What is spoken of, as "digits_judge", or "diversity (vendi)"."""
    main: Markup
    """The gains, as "soar gains 7.3 points over base, 95 % interval 5.8 to 8.7"."""
    more: Markup
    """What was measured, on how many prompts, and from where to where it went."""


def verdict(rows: Sequence[Row], starts: Mapping[str, str]) -> list[Sentence]:
    """Return a sentence for each metric, the quality before the diversity."""
    every = [row for row in rows if row["category"] == "all"]
    metrics = names(every, "metric")
    ordered = [m for m in metrics if m not in DIVERSITY] + [m for m in metrics if m in DIVERSITY]
    return [_of_metric(metric, [row for row in every if row["metric"] == metric], starts) for metric in ordered]


def _named(metric: str) -> str:
    return f"diversity ({metric})" if metric in DIVERSITY else metric


def _of_metric(metric: str, rows: Sequence[Row], starts: Mapping[str, str]) -> Sentence:
    numbers = Numbers.of(rows)
    parts = list(_parts(rows, numbers, starts))
    if parts:
        return Sentence(_named(metric), Markup("; ").join(parts) + ".", _closing(metric, rows, numbers, starts))
    value, interval = numbers.value(rows[0])
    text = Markup("{} scores {}, {}; no stage has been evaluated yet.")
    more = Markup("{} on {} held-out prompts.").format(metric, rows[0]["n"])
    return Sentence(
        _named(metric), text.format(_strong(rows[0]["stage"]), value, _interval(interval, first=True)), more
    )


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
    """Return what a stage does: "soar gains 7.3 points over base, 95 % interval 5.8 to 8.7"."""
    if gain.direction == "up":
        text = "{} a further {}{}" if further else f"{{}} gains {{}}{{}} over {start}"
    elif gain.direction == "down":
        text = f"{{}} loses {{}}{{}} against {start}"
    else:
        how = f"{gain.text}{gain.unit}, {_interval(gain.interval, first)}"
        return Markup("{} shows no sure change from {} ({})").format(_strong(stage), start, how)
    said = Markup("{}").format(_strong(stage))
    interval = _interval(gain.size_interval, first)
    return said + escape(text.format("", gain.size, gain.unit)) + (f", {interval}" if first else f" ({interval})")


def _interval(text: str, first: bool) -> str:
    return f"95 % interval {text}" if first and text != UNKNOWN else text


def _closing(metric: str, rows: Sequence[Row], numbers: Numbers, starts: Mapping[str, str]) -> Markup:
    """Return what was measured on how many prompts, and the value of each stage."""
    values = ", ".join(f"{row['stage']} {numbers.value(row)[0]}" for row in rows)
    ends = Markup("{} on {} held-out prompts: {}").format(metric, rows[0]["n"], values)
    last = rows[-1]
    whole = gain_of(last, numbers, "base_gain")
    if whole and whole.direction and starts.get(starts.get(last["stage"], "")):
        side = "under" if whole.text.startswith("-") else "over"
        base = base_of(last["stage"], starts)
        ends += Markup("; {} is {}{} {} {}").format(last["stage"], whole.size, whole.unit, side, base)
    return ends + "."


def _strong(stage: str) -> Markup:
    return Markup("<b>{}</b>").format(stage)
