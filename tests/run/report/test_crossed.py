"""Intervals over seeds and prompts: they cover the truth, and would not without the part of the seeds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from corefit.run.report import crossed, intervals
from corefit.run.report.crossed import of_gain, of_mean, spread


def drawn(number: int, seeds: int, sd: float, prompts: int = 400, each: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return values [seeds, prompts] whose mean is 0 in truth, and clusters; prompts and noise have a spread of 0.4.

    sd  spread of the seeds
    """
    draws, clusters = np.random.default_rng([number, seeds]), np.arange(prompts) // each
    of_prompts = draws.normal(0, 0.4, prompts // each)[clusters]
    return draws.normal(0, sd, (seeds, 1)) + of_prompts + draws.normal(0, 0.4, (seeds, prompts)), clusters


def coverage(seeds: int, sd: float, kind: intervals.Kind = "unbounded", **how: int) -> float:
    """Return in what share of 600 studies the interval holds the truth; shares are of values above 0."""
    truth, found = (0.0, 0) if kind == "unbounded" else (0.5, 0)
    for number in range(600):
        values, clusters = drawn(number, seeds, sd, **how)
        low, high = of_mean((values > 0) * 1.0 if kind == "binary" else values, clusters, kind) or (1.0, 0.0)
        found += low <= truth <= high
    return found / 600


@pytest.mark.parametrize(("seeds", "sd"), [(5, 0.0), (5, 0.02), (5, 0.05), (3, 0.02)])
def test_intervals_cover(seeds: int, sd: float):
    """A spread of the seeds of 0.02 is as large as that of the mean over 400 prompts."""
    assert 0.92 <= coverage(seeds, sd) <= 0.98
    assert 0.92 <= coverage(seeds, sd, prompts=480, each=8) <= 0.98


def test_two_seeds_cover_less():
    assert 0.86 <= coverage(2, 0.1) <= 0.98


def test_intervals_of_shares_cover():
    assert 0.92 <= coverage(5, 0.05, "binary") <= 0.98


def test_without_the_seeds_they_would_not(monkeypatch):
    """With 5 seeds that differ by 0.05, prompts alone explain little of what another study would find."""
    monkeypatch.setattr(crossed, "spread", lambda values, clusters: spread_of_prompts(values))
    assert coverage(5, 0.05) < 0.9


def spread_of_prompts(values: np.ndarray) -> tuple[float, float]:
    means = values.mean(0)
    return float(means.var(ddof=1) / len(means)), len(means) - 1.0


def test_the_variance_is_that_of_an_analysis_of_variance():
    """Over many studies it is the variance that means really have, also where seeds are two."""
    for seeds in (2, 5):
        studies = [drawn(number, seeds, 0.06, 60) for number in range(1500)]
        means = np.var([values.mean() for values, _ in studies], ddof=1)
        assert np.mean([spread(values, clusters)[0] for values, clusters in studies]) == pytest.approx(means, rel=0.12)


def test_what_is_of_neither_counts_once():
    """Where values differ by chance alone, the variances of seeds and of prompts are both that of the whole mean."""
    noise = np.random.default_rng(0).normal(size=(400, 5, 60))
    found = [300 * spread(values, np.arange(60))[0] for values in noise]
    assert 1 <= np.mean(found) < 1.5, "more than 1 for neither may be larger than the whole; 2 if both counted"


def test_one_part_alone_is_students_interval():
    """Seeds that are each the same on all prompts are five numbers; prompts that all seeds agree on are 40."""
    five, forty = np.array([0.1, 0.4, 0.2, 0.5, 0.3]), np.random.default_rng(3).normal(size=40)
    for values, numbers in ((np.tile(five[:, None], 40), five), (np.tile(forty, (5, 1)), forty)):
        expected = stats.t.interval(0.95, len(numbers) - 1, numbers.mean(), stats.sem(numbers))
        assert of_mean(values, np.arange(40), "unbounded") == pytest.approx(expected, rel=5e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(2, 12), st.integers(1, 3), st.integers(0, 99))
def test_the_interval_moves_and_stretches_with_the_values_and_knows_no_order(seeds, prompts, each, number):
    draws = np.random.default_rng(number)
    values, clusters = draws.normal(size=(seeds, prompts * each)), np.repeat(np.arange(prompts), each)
    low, high = of_mean(values, clusters, "unbounded") or (0.0, 0.0)
    assert low < values.mean() < high
    assert of_mean(3 * values + 7, clusters, "unbounded") == pytest.approx((3 * low + 7, 3 * high + 7))
    order, rows = draws.permutation(values.shape[1]), draws.permutation(seeds)
    assert of_mean(values[rows][:, order], 5 * clusters[order] + 2, "unbounded") == pytest.approx((low, high))


def test_one_seed_has_the_interval_over_prompts():
    values, clusters = (drawn(1, 1, 0.0)[0] > 0) * 1.0, np.arange(400)
    assert of_mean(values, clusters, "binary") == intervals.of_mean(values[0], clusters, "binary")
    gains = values - values[:, ::-1]
    assert of_gain(gains, clusters, "binary") == intervals.of_gain(gains[0], clusters, "binary")


def test_what_agrees_has_the_interval_that_bounds_allow():
    ones, clusters = np.ones((3, 30)), np.arange(30)
    assert of_mean(ones, clusters, "unbounded") is None
    assert of_mean(ones, clusters, "binary") == intervals.agreeing(1.0, 30, (0.0, 1.0))
    assert of_gain(0 * ones, clusters, "share") == intervals.agreeing(0.0, 30, (-1.0, 1.0))
    assert of_mean(np.random.default_rng(0).normal(size=(3, 4)), np.zeros(4, int), "unbounded") is None, "one prompt"


def test_shares_stay_within_their_bounds():
    values = np.ones((3, 30))
    values[0] = 0.0
    assert of_mean(values, np.arange(30), "binary") == (0.0, 1.0)


def test_students_quantile_between_whole_numbers():
    df = np.linspace(1, 9, 50)
    ratios = [intervals.student(each) for each in df] / stats.t.ppf(0.975, df)
    assert 0.993 < min(ratios) <= max(ratios) < 1.03
