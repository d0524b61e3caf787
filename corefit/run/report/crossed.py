"""95 % intervals of means over seeds of training and held-out prompts, and of gains paired in both.

Every seed is evaluated on the same prompts and the same noise, so values [seeds, prompts] are crossed: one seed may be
better on all prompts, one prompt harder for all seeds. An interval over prompts alone answers how the mean would vary
with other prompts for these very seeds; those given here answer how it would vary with other prompts and other seeds.
"""

from __future__ import annotations

import math

import numpy as np

from corefit.run.report import intervals
from corefit.run.report.intervals import Floats, Interval, Kind, Labels


def of_mean(values: Floats, clusters: Labels, kind: Kind) -> Interval | None:
    """Return the interval of the mean of `values` [seeds, n]; None where nothing is known of their spread.

    With one seed it is that of `intervals.of_mean`, over prompts alone.

    clusters  [n], equal where prompts are equal
    """
    if len(values) == 1:
        return intervals.of_mean(values[0], clusters, kind)
    return _within(values, clusters, None if kind == "unbounded" else (0.0, 1.0))


def of_gain(differences: Floats, clusters: Labels, kind: Kind) -> Interval | None:
    """Return the interval of the mean of paired differences [seeds, n]; None where nothing is known of their spread.

    With one seed it is that of `intervals.of_gain`, over prompts alone.

    clusters  [n], equal where prompts are equal
    """
    if len(differences) == 1:
        return intervals.of_gain(differences[0], clusters, kind)
    return _within(differences, clusters, None if kind == "unbounded" else (-1.0, 1.0))


def _within(values: Floats, clusters: Labels, bounds: Interval | None) -> Interval | None:
    """Return Student's interval within `bounds`; where seeds and clusters agree, what the bounds allow."""
    mean, groups = float(values.mean()), len(np.unique(clusters))
    variance, df = spread(values, clusters) if groups > 1 else (0.0, 1.0)
    if math.sqrt(variance) <= 1e-9 * np.abs(values).max():
        return intervals.agreeing(mean, groups, bounds) if bounds else None
    half = intervals.student(df) * math.sqrt(variance)
    return (max(mean - half, bounds[0]), min(mean + half, bounds[1])) if bounds else (mean - half, mean + half)


def spread(values: Floats, clusters: Labels) -> tuple[float, float]:
    """Return the variance of the mean of `values` [seeds, n], and its degrees of freedom.

    The variance is that of seeds, plus that of clusters of equal prompts, minus the part that both contain (Cameron,
    Gelbach and Miller, 2011, equation 2.9), and no less than either. That part is estimated from what is left after
    the means of seeds and of clusters, as in an analysis of variance in two ways: so the sum is unbiased for few seeds,
    too. The degrees of freedom are Satterthwaite's (1946), of seeds - 1 and clusters - 1.
    """
    _, member, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    seeds, groups, centered = len(values), len(sizes), values - values.mean()
    sums = np.stack([np.bincount(member, row, groups) for row in centered])  # [seeds, clusters]
    by_seed, by_cluster = sums.sum(1), sums.sum(0)
    rest = sums - by_cluster / seeds - np.outer(by_seed, sizes / sizes.sum())
    few, some = seeds / (seeds - 1), groups / (groups - 1)
    of_seeds, of_clusters, of_rest = (
        factor * float((found**2).sum()) / values.size**2
        for factor, found in ((few, by_seed), (some, by_cluster), (few * some, rest))
    )
    variance = max(of_seeds + of_clusters - of_rest, of_seeds, of_clusters)
    if not variance:
        return 0.0, 1.0
    return variance, 1 / ((of_seeds / variance) ** 2 / (seeds - 1) + (of_clusters / variance) ** 2 / (groups - 1))
