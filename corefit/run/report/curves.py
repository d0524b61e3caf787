"""Draws the curves of a metrics.jsonl, a small panel for each metric."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corefit.run.report.metrics import read_metrics
from corefit.system.files import write_whole

Floats = NDArray[np.float64]
LONG, NOISY = 40, 0.3
"""A curve is smoothed if it has this many points and its steps differ by more than this share of its spread."""


def curves(metrics_jsonl: Path, png: Path) -> None:
    """Draw one panel per numeric metric against the step; long noisy curves also get a moving average."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = _series(read_metrics(metrics_jsonl))
    columns = max(1, min(3, len(series)))
    rows = max(1, math.ceil(len(series) / columns))
    figure: Any = Figure(figsize=(0.3 + 3.9 * columns, 0.2 + 2.3 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for i, (name, (steps, values)) in enumerate(series.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        _panel(axes, name, steps, values)
        if i + columns >= len(series):
            axes.set_xlabel("step", fontsize=8, color="0.35")
    if not series:
        figure.text(0.5, 0.5, "no step was logged", ha="center", color="0.35")
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    write_whole(png, data.getvalue())


def _series(lines: list[dict[str, Any]]) -> dict[str, tuple[Floats, Floats]]:
    """Return metric -> (steps [n], values [n]); a logged null is NaN."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and (value is None or type(value) in (int, float)):
                found.setdefault(name, []).append((line["step"], math.nan if value is None else value))
    arrays = {name: np.asarray(points, np.float64).T for name, points in found.items()}
    return {name: (steps, values) for name, (steps, values) in arrays.items()}


def _panel(axes: Any, name: str, steps: Floats, values: Floats) -> None:
    from matplotlib.ticker import MaxNLocator

    smooth = _smooth(values)
    marker = "o" if np.isfinite(values).sum() < 3 else None
    if smooth is None:
        axes.plot(steps, values, color="#2563a8", linewidth=1.3, marker=marker, markersize=3)
    else:
        axes.plot(steps, values, color="#2563a8", linewidth=0.7, alpha=0.3)
        axes.plot(steps, smooth, color="#17406f", linewidth=1.5)
    axes.set_title(name, fontsize=9, loc="left", color="0.15", parse_math=False)
    axes.tick_params(labelsize=7.5, color="0.6", labelcolor="0.3", length=2.5)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter("{x:.6g}")
    axes.grid(color="0.92", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("0.7")
    missing = int(np.isnan(values).sum())
    if missing:
        axes.set_title(f"{missing} not finite", fontsize=7.5, loc="right", color="#b3261e")


def _smooth(values: Floats) -> Floats | None:
    """Return a centered moving average over a twentieth of the curve, [n], or None if the curve needs none."""
    finite = np.isfinite(values)
    known = values[finite]
    if len(known) < LONG or np.diff(known).std() <= NOISY * known.std():
        return None
    window = np.ones(2 * max(2, len(values) // 40) + 1)
    sums = np.convolve(np.where(finite, values, 0.0), window, "same")
    counts = np.convolve(finite.astype(np.float64), window, "same")
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0.5)
