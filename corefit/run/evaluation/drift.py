"""The exposure-bias meter: how far a model's own trajectory drifts from the ideal one, per noise level.

Training shows a model states on the straight line from a real sample to noise. Sampling shows it states that its own
earlier steps have led to. The drift is the distance between the two, from the same noise: SOAR (arXiv 2604.12617)
calls what a step adds to it Delta, and corrects it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import frozen

from corefit.data.dataset import Dataset
from corefit.flow import interpolate, per_sample
from corefit.rollout.loop import rollout
from corefit.rollout.samplers import Ode
from corefit.run.report import intervals
from corefit.types import Backbone, Condition

if TYPE_CHECKING:
    from torch import Tensor


@frozen
class Drifts:
    """What was measured: drift [examples, levels] at noise levels sigmas [levels], and the examples' prompts."""

    sigmas: Sequence[float]
    values: Sequence[Sequence[float]]
    prompts: Sequence[str]


def examples(data: Dataset, count: int) -> list[int]:
    """Return `count` examples of the most frequent size, or all of them if there are fewer, evenly spread."""
    rows = max(data.buckets.values(), key=len)
    count = min(count, len(rows))
    return [int(rows[number * len(rows) // count]) for number in range(count)]


def levels(backbone: Backbone, steps: int, shape: Sequence[int], start: float) -> Tensor:
    """Return the noise levels of the trajectory: those of the sampling grid that are not above `start`, [levels + 1].

    At least one step is left, the last.
    """
    grid = backbone.sigmas(steps, tuple(shape))
    first = int((grid > start).sum())
    return grid[min(first, len(grid) - 2) :]


def measure(backbone: Backbone, x0: Tensor, noise: Tensor, cond: Condition, grid: Tensor, *, guidance: float) -> Tensor:
    """Return the drift [B, levels] after each step of the ODE from grid[0] to grid[-1], grid [levels + 1].

    The trajectory begins on the line from x0 [B, ...] to noise [B, ...]. The drift is the root mean square, over the
    elements of a latent, of the state minus the point of that line at the same noise level.
    """
    import torch

    grid = grid.to(x0.device)

    def ideal(sigma: Tensor) -> Tensor:
        return interpolate(x0, noise, sigma.expand(len(x0)))

    found = [
        per_sample((taken.x_next - ideal(taken.sigma_next[0])) ** 2).sqrt()
        for taken in rollout(backbone, Ode(), ideal(grid[0]), cond, grid, guidance=guidance)
    ]
    return torch.stack(found, 1)


def curve(drifts: Drifts, before: Drifts | None = None) -> dict[str, Any]:
    """Return the content of drift.json: means over the examples with 95 % intervals, clustered by prompt.

    before  what the weights had that a stage starts from; with it, `change` and its interval are the paired change
            since then
    """
    values, clusters = np.array(drifts.values), intervals.labels(drifts.prompts)
    made = {"sigmas": list(drifts.sigmas), "n": len(values), **_columns("drift", "", values, clusters)}
    if before is None:
        return made
    assert (before.sigmas, before.prompts) == (drifts.sigmas, drifts.prompts), "drift of different examples"
    return made | _columns("change", "change_", values - np.array(before.values), clusters)


def _columns(name: str, prefix: str, values: intervals.Floats, clusters: intervals.Labels) -> dict[str, Any]:
    """Return the mean of each column of values [n, levels], and its interval, null where none can be given."""
    found = [intervals.of_mean(column, clusters, "unbounded") or (None, None) for column in values.T]
    low, high = zip(*found, strict=True)
    return {name: values.mean(0).tolist(), f"{prefix}low": list(low), f"{prefix}high": list(high)}
