"""Draws a comparison of several seeds: for each metric a panel, with a line, an interval and dots for each stage."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from corefit.run.report.seeds import SeedsRow
from corefit.run.report.table import Numbers, direction, names
from corefit.system.files import write_whole

COLUMNS, MOST_BANDS = 3, 8
"""Panels beside each other, and curves up to which each has its interval drawn."""
COLORS = {"up": "#1a7f37", "down": "#b3261e", "": "#17406f"}
"""Of stages whose gain excludes 0, and of others."""


def forest(rows: Sequence[SeedsRow], png: Path) -> None:
    """Draw the rows of all prompts: a panel for each metric, the mean of each stage, its interval, and each seed.

    A stage is green or red where its gain excludes 0: over the stage that was named, or else over the base.
    """
    metrics, stages = names(rows, "metric"), names(rows, "stage")
    width = max(map(len, stages), default=1)
    figure: Any = _figure(len(metrics), 0.09 * width + 3.2, 0.26 * len(stages) + 0.9)
    for number, metric in enumerate(metrics):
        axes = figure.add_subplot(math.ceil(len(metrics) / COLUMNS), min(COLUMNS, len(metrics)), number + 1)
        found = {row["stage"]: row for row in rows if (row["metric"], row["category"]) == (metric, "all")}
        _panel(axes, found, stages)
    if not metrics:
        figure.text(0.5, 0.5, "nothing was scored", ha="center", color="0.35")
    _save(figure, png)


def drift_curves(curves: Sequence[Mapping[str, Any]], png: Path) -> None:
    """Draw the drift of each stage against the noise level, and its change since what the stage starts from."""
    import matplotlib

    figure, colors = _figure(2, 5.4, max(3.6, 0.17 * len(curves) + 0.6)), cast(Any, matplotlib.colormaps["tab20"])
    palette = [colors(number) for number in (*range(0, 20, 2), *range(1, 20, 2))]  # each color also has a pale one
    for number, (key, prefix) in enumerate((("drift", ""), ("change", "change_"))):
        axes = figure.add_subplot(1, 2, number + 1)
        for place, curve in enumerate(curves):
            if key not in curve:
                continue
            color = palette[place % len(palette)]
            axes.plot(curve["sigmas"], curve[key], color=color, linewidth=1.3, label=curve["stage"])
            low, high = curve[f"{prefix}low"], curve[f"{prefix}high"]
            if None not in (*low, *high) and len(curves) <= MOST_BANDS:
                axes.fill_between(curve["sigmas"], low, high, color=color, alpha=0.12, linewidth=0)
        axes.invert_xaxis()
        axes.set_xlabel("noise level", fontsize=8, color="0.35")
        _dress(axes, "drift" if key == "drift" else "its change since what the stage starts from")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7, frameon=False)
    _save(figure, png)


def _figure(panels: int, width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns, lines = max(1, min(COLUMNS, panels)), max(1, math.ceil(panels / COLUMNS))
    figure = Figure(figsize=(width * columns, height * lines), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _panel(axes: Any, found: Mapping[str, SeedsRow], stages: Sequence[str]) -> None:
    """Draw the rows of one metric, the first stage at the top, and a dashed line at what the colors refer to."""
    numbers, first = Numbers.of([*found.values()]), next(iter(found.values()))
    scale, over = 100 if numbers.percent else 1, first.get("over", stages[0])
    for place, stage in enumerate(stages):
        if row := found.get(stage):
            color = COLORS[_direction(row, numbers)]
            ends = [scale * row.get("low", row["value"]), scale * row.get("high", row["value"])]
            axes.plot(ends, [place, place], color=color, linewidth=1.6, solid_capstyle="butt")
            axes.plot([scale * row["value"]], [place], "D", color=color, markersize=4.5)
            each = [scale * value for value in row.get("each", {}).values()]
            axes.plot(each, [place + 0.25] * len(each), "o", color="0.35", markersize=3.2, alpha=0.7, markeredgewidth=0)
    if over in found:
        axes.axvline(scale * found[over]["value"], color="0.6", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(stages)), stages, fontsize=8, parse_math=False)
    axes.set_ylim(len(stages) - 0.4, -0.6)
    measured = f"{first['n']} {first.get('of', 'held-out prompts')}, the line is {over}"
    _dress(axes, f"{first['metric']}{', %' if numbers.percent else ''}\n{measured}")


def _direction(row: SeedsRow, numbers: Numbers) -> str:
    """Return "up" or "down" as the table colors a gain."""
    found = direction(row, numbers, "over_gain" if "over" in row else "base_gain")
    return {"up": "down", "down": "up", "": ""}[found] if "of" in row else found


def _dress(axes: Any, name: str) -> None:
    axes.set_title(name, fontsize=8.5, loc="left", color="0.15", parse_math=False)
    axes.tick_params(labelsize=7.5, color="0.6", labelcolor="0.3", length=2.5)
    axes.grid(color="0.92", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("0.7")


def _save(figure: Any, png: Path) -> None:
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    write_whole(png, data.getvalue())
