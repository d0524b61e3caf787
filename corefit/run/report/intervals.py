"""95 % intervals of means over held-out prompts, and of paired gains.

Samples of one prompt are not independent: identical prompts form a cluster, and whatever is estimated here is estimated
from the spread between clusters. Where every prompt occurs once, that is the usual interval over samples.

No interval has width zero because the samples happen to agree. Shares, which lie between 0 and 1, get the interval
that this bound allows; of a metric without bounds, agreement says nothing about its spread, and there is no interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from corefit.rng import generator

Floats = NDArray[np.float64]
Labels = NDArray[np.intp]
Interval = tuple[float, float]
Kind = Literal["binary", "share", "unbounded"]
"""What values a metric has: 0 or 1 alone, numbers from 0 to 1, or any."""
Z = 1.959963984540054
"""The 97.5 % quantile of the standard normal."""


def of_mean(values: Floats, clusters: Labels, kind: Kind) -> Interval | None:
    """Return the interval of the mean of `values` [n]; None where nothing is known of their spread.

    Binary: Wilson's score interval at the effective sample size. Others: the bootstrap over clusters.

    clusters  [n], equal where prompts are equal
    """
    if kind == "binary":
        size = effective_size(values, clusters)
        return wilson(float(values.mean()) * size, size)
    return _bootstrap_or_bound(values, clusters, None if kind == "unbounded" else (0.0, 1.0))


def of_gain(differences: Floats, clusters: Labels, kind: Kind) -> Interval | None:
    """Return the interval of the mean of paired differences [n]; None where nothing is known of their spread.

    Binary: Tango's score interval at the effective sample size. Others: the bootstrap over clusters.

    clusters  [n], equal where prompts are equal
    """
    if kind == "binary":
        size = effective_size(differences, clusters)
        up, down = float((differences > 0).mean()), float((differences < 0).mean())
        return tango(up * size, down * size, size)
    return _bootstrap_or_bound(differences, clusters, None if kind == "unbounded" else (-1.0, 1.0))


def _bootstrap_or_bound(values: Floats, clusters: Labels, bounds: Interval | None) -> Interval | None:
    sums, sizes = _by_cluster(values, clusters)
    means = sums / sizes
    if np.ptp(means) <= 1e-9 * np.abs(means).max():
        return agreeing(float(values.mean()), len(sizes), bounds) if bounds else None
    low, high = bootstrap(values, clusters=clusters)
    return (max(low, bounds[0]), min(high, bounds[1])) if bounds else (low, high)


def wilson(successes: float, n: float) -> Interval:
    """Return the score interval of a proportion (Wilson, 1927)."""
    p, z2 = successes / n, Z * Z / n
    center = (p + z2 / 2) / (1 + z2)
    half = Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n)) / (1 + z2)
    return max(0.0, min(p, center - half)), min(1.0, max(p, center + half))


def tango(up: float, down: float, n: float) -> Interval:
    """Return the score interval of (up - down) / n, a difference of paired proportions (Tango, 1998).

    up, down  how many of n pairs changed from 0 to 1, and from 1 to 0
    """
    gain = (up - down) / n

    def excess(delta: float) -> float:
        """Return the squared score statistic of the hypothesis that the difference is `delta`, minus its quantile."""
        b = (2 * n - up + down) * delta - up - down
        root = math.sqrt(max(0.0, b * b + 8 * n * down * delta * (1 - delta)))
        variance = n * ((root - b) / (2 * n) + delta * (1 - delta))
        return n * n * (gain - delta) ** 2 - Z * Z * variance

    def limit(outer: float) -> float:
        inner = gain
        for _ in range(60):
            middle = (inner + outer) / 2
            inner, outer = (middle, outer) if excess(middle) < 0 else (inner, middle)
        return inner

    return limit(-1.0), limit(1.0)


def bootstrap(values: Floats, resamples: int = 2000, clusters: Labels | None = None) -> Interval:
    """Return the percentile bootstrap interval of the mean of `values` [n], by resamples of a fixed seed.

    Whole clusters are drawn, or single values where `clusters` is None. The percentiles are expanded for few clusters,
    as in Hesterberg, 2015 (What teachers should know about the bootstrap), section 4.5; for many they are the usual.
    """
    sums, sizes = _by_cluster(values, np.arange(len(values)) if clusters is None else clusters)
    draw, g = generator("report", "bootstrap"), len(sums)
    block = max(1, 2**20 // g)  # resamples at once, to limit memory
    means: list[Floats] = []
    for done in range(0, resamples, block):
        drawn = draw.integers(0, g, (min(block, resamples - done), g))
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    tail = 0.5 * math.erfc(math.sqrt(g / (g - 1) / 2) * student(g - 1)) if g > 1 else 0.0
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def agreeing(value: float, clusters: int, bounds: Interval) -> Interval:
    """Return the interval of a mean within `bounds` of which every cluster observed has the same `value`.

    With 97.5 % confidence, at most a share 1 - 0.025 ** (1 / clusters) of all prompts differs (Clopper and Pearson,
    1934: nothing found in so many), and each that differs has a value within the bounds.
    """
    differing = 1 - 0.025 ** (1 / clusters)
    return value - differing * (value - bounds[0]), value + differing * (bounds[1] - value)


def effective_size(values: Floats, clusters: Labels) -> float:
    """Return how many independent samples would tell as much of the mean of `values` [n]; n if all prompts differ.

    That is n over the design effect, which is the variance of the mean between clusters over that between samples, and
    a factor for few clusters (Korn and Graubard, 1998). Where all values agree, a cluster counts as one sample.
    """
    sums, sizes = _by_cluster(values, clusters)
    n, g, mean = len(values), len(sums), values.mean()
    spread = float(((values - mean) ** 2).sum())
    if g in (1, n) or spread == 0:
        return float(g)
    between = float(((sums - sizes * mean) ** 2).sum())
    design = max(1.0, g / (g - 1) * between * (n - 1) / (n * spread))
    return max(1.0, n / design * (student(n - 1) / student(g - 1)) ** 2)


def student(df: float) -> float:
    """Return the 97.5 % quantile of Student's t (Abramowitz and Stegun, 26.7.5), to 0.2 % for whole numbers.

    It is to 0.7 % between whole numbers; below two degrees of freedom it is interpolated, and up to 3 % too large.
    """
    one, two = math.tan(0.475 * math.pi), 0.95 * math.sqrt(2 / (1 - 0.95**2))
    if df <= 2:
        return one if df == 1 else two * (one / two) ** (2 / df - 1)
    z = Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / df**power for power, term in enumerate(terms, 1))


def labels(prompts: Sequence[str]) -> Labels:
    """Return a number for each prompt, equal where prompts are equal."""
    return np.unique(np.array(prompts), return_inverse=True)[1].ravel()


def _by_cluster(values: Floats, clusters: Labels) -> tuple[Floats, Floats]:
    """Return the sum of the values and their number, for each cluster in the order of its first sample."""
    _, first, member = np.unique(clusters, return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(first))[member.ravel()]
    return np.bincount(order, values).astype(np.float64), np.bincount(order).astype(np.float64)
