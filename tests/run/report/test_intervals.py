from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from corefit.run.report.intervals import (
    Z,
    agreeing,
    bootstrap,
    effective_size,
    labels,
    of_gain,
    of_mean,
    student,
    tango,
    wilson,
)


def draws(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [  # Newcombe (1998), Statistics in Medicine 17:857-872, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_is_as_published(hits: int, n: int, low: float, high: float):
    assert wilson(hits, n) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(1, 500), st.floats(0, 1))
def test_wilson_contains_the_proportion_and_mirrors(n: int, part: float):
    hits = round(part * n)
    low, high = wilson(hits, n)
    assert 0 <= low <= hits / n <= high <= 1
    assert wilson(n - hits, n) == pytest.approx((1 - high, 1 - low))


def test_wilson_covers():
    covered = [low <= 0.2 <= high for hits in draws(1).binomial(60, 0.2, 4000) for low, high in [wilson(hits, 60)]]
    assert 0.93 < np.mean(covered) < 0.97


def test_bootstrap_covers():
    """The mean of a skewed metric: percentile intervals at n = 80 cover a little less than 95 %."""
    samples = draws(2).exponential(1.0, (300, 80))
    assert 0.89 < np.mean([low <= 1 <= high for low, high in map(bootstrap, samples)]) < 0.98


def test_bootstrap_is_the_normal_interval_for_many_values():
    values = draws(3).normal(2.0, 3.0, 4000)
    half = 1.96 * values.std() / math.sqrt(4000)
    assert bootstrap(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30), st.floats(-100, 100), st.floats(0.1, 10))
def test_bootstrap_moves_and_stretches_with_the_values(values: list[float], shift: float, scale: float):
    low, high = bootstrap(np.array(values))
    moved = bootstrap(scale * np.array(values) + shift)
    assert moved == pytest.approx((scale * low + shift, scale * high + shift), abs=1e-9)


def test_bootstrap_in_blocks_has_all_resamples():
    values = draws(4).normal(size=3000)
    assert bootstrap(values, 2000) == bootstrap(values, 2000) != bootstrap(values, 400)


def test_student_is_the_quantile():
    assert [student(df) for df in range(1, 200)] == pytest.approx(stats.t.ppf(0.975, range(1, 200)), rel=2e-3)


# Paired shares


@pytest.mark.parametrize(("up", "down", "n"), [(12, 2, 50), (0, 0, 30), (3, 0, 54), (1, 9, 44), (20, 20, 40)])
def test_tango_is_where_the_score_statistic_is_the_quantile(up: int, down: int, n: int):
    """Tango (1998): the share that goes down is the most likely one under the hypothesis, found here by search."""

    def statistic(delta: float) -> float:
        def minus_log_likelihood(q: float) -> float:
            cells = ((up, q + delta), (down, q), (n - up - down, 1 - 2 * q - delta))
            return -sum(count * math.log(max(p, 1e-300)) for count, p in cells if count)

        bounds = (max(0.0, -delta), (1 - delta) / 2)
        q = optimize.minimize_scalar(minus_log_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        return (up - down - n * delta) / math.sqrt(n * (2 * q + delta - delta**2))

    low, high = tango(up, down, n)
    assert low <= (up - down) / n <= high
    assert (statistic(low), statistic(high)) == pytest.approx((Z, -Z), abs=1e-3)


@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 1))
def test_tango_mirrors_and_stays_within_one(n: int, part: float, of_part: float):
    up = round(part * n)
    down = round(of_part * (n - up))
    low, high = tango(up, down, n)
    assert -1 <= low <= (up - down) / n <= high <= 1
    assert high - low > 1e-3
    assert tango(down, up, n) == pytest.approx((-high, -low), abs=1e-9)


def test_where_no_pair_changes_tango_is_as_wide_as_wilson_where_none_succeeds():
    assert tango(0, 0, 30) == pytest.approx((-wilson(0, 30)[1], wilson(0, 30)[1]))


# Clusters of equal prompts


def paired(rng: np.random.Generator, clusters: int, repeats: int, gain: float) -> tuple[np.ndarray, ...]:
    """Return hits before and after, and the cluster of each sample; prompts differ in how hard they are."""
    label = np.repeat(np.arange(clusters), repeats)
    easy = rng.beta(1, 1, clusters)[label] * (1 - gain)
    before, after = (rng.random(len(label)) < p for p in (easy, easy + gain))
    return before.astype(float), after.astype(float), label


@pytest.mark.parametrize(("clusters", "repeats"), [(30, 1), (30, 4), (12, 8)])
def test_intervals_of_shares_cover(clusters: int, repeats: int):
    """Of a share whose mean is 0.45 and then 0.55, and of its gain of 0.1, in 1,000 simulated evaluations."""
    covered = np.zeros((1000, 2))
    for number, rng in enumerate(map(draws, range(1000))):
        before, after, label = paired(rng, clusters, repeats, 0.1)
        (low, high), (worse, better) = of_mean(after, label, "binary"), of_gain(after - before, label, "binary")
        covered[number] = low <= 0.55 <= high, worse <= 0.1 <= better
    assert ((covered.mean(0) > 0.92) & (covered.mean(0) < 0.98)).all(), covered.mean(0)


@pytest.mark.parametrize(("clusters", "repeats"), [(30, 1), (16, 4)])
def test_intervals_of_other_metrics_cover(clusters: int, repeats: int):
    """Half of the variance is between prompts; ignoring that, intervals would cover 4 of 5 times."""
    covered, ignorant = [], []
    for rng in map(draws, range(300)):
        label = np.repeat(np.arange(clusters), repeats)
        values = rng.normal(size=clusters)[label] + rng.normal(size=len(label))
        low, high = of_mean(values, label, "unbounded")
        covered.append(low <= 0 <= high)
        low, high = of_mean(values, np.arange(len(values)), "unbounded")
        ignorant.append(low <= 0 <= high)
    assert 0.92 < np.mean(covered) < 0.98
    assert repeats == 1 or np.mean(ignorant) < 0.87


def test_where_every_prompt_occurs_once_clusters_change_nothing():
    values, label = draws(5).normal(size=40), labels([f"p{n}" for n in range(40)])
    assert bootstrap(values, clusters=label) == bootstrap(values)
    hits = (values > 0).astype(float)
    assert of_mean(hits, label, "binary") == wilson(hits.sum(), 40)


def test_repeating_every_sample_adds_nothing():
    values = (draws(6).random(25) < 0.6).astype(float)
    repeated, label = np.repeat(values, 10), np.repeat(np.arange(25), 10)
    assert 20 < effective_size(repeated, label) < 26
    once, often = wilson(values.sum(), 25), of_mean(repeated, label, "binary")
    assert often == pytest.approx(once, abs=0.02)
    plain = np.repeat(draws(7).normal(size=25), 10)
    assert of_mean(plain, label, "unbounded") == pytest.approx(bootstrap(plain[::10]))


def test_samples_that_differ_within_prompts_count_in_full():
    """Each prompt has one hit and one miss: the clusters agree, and more samples are not claimed than there are."""
    assert effective_size(np.tile([0.0, 1.0], 200), np.repeat(np.arange(200), 2)) == pytest.approx(400, rel=0.02)


# Agreement


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_agreeing_shares_have_an_interval(value: float):
    """Clopper and Pearson's where the value is 0 or 1."""
    low, high = of_mean(np.full(30, value), np.arange(30), "share")
    assert 0 <= low <= value <= high <= 1
    assert high - low == pytest.approx(stats.binomtest(0, 30).proportion_ci().high)


@pytest.mark.parametrize("kind", ["binary", "share"])
def test_agreeing_differences_have_an_interval(kind):
    low, high = of_gain(np.zeros(30), np.arange(30), kind)
    assert low == -high
    assert 0.1 < high < 0.13
    twice = of_gain(np.zeros(60), np.repeat(np.arange(30), 2), kind)
    assert twice == pytest.approx((low, high))  # equal prompts that agree are one


def test_where_values_without_bounds_agree_there_is_no_interval():
    """Rounding apart: 0.1 added to every value is not always 0.1 when it is taken off again."""
    values = draws(8).normal(0, 10, 50)
    assert of_gain((values + 0.1) - values, np.arange(50), "unbounded") is None
    assert of_mean(np.array([5.0]), np.arange(1), "unbounded") is None
    assert of_gain(np.array([0.1, 0.1, 0.2]), np.arange(3), "unbounded") is not None


def test_what_agreement_leaves_open_is_found_rarely():
    """If as many prompts differed as the interval allows, 60 that agree would be found in 2.5 % of evaluations."""
    low, high = agreeing(1.0, 60, (0, 1))
    assert (low**60, high) == pytest.approx((0.025, 1))
    low, high = agreeing(0.0, 60, (-1, 1))
    assert ((1 - high) ** 60, -low) == pytest.approx((0.025, high))


def test_intervals_of_shares_stay_within_their_bounds():
    values = np.array([1.0] * 9 + [0.5])
    assert of_mean(values, np.arange(10), "share")[1] <= 1
    assert of_gain(-values, np.arange(10), "share")[0] >= -1
