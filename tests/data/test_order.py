"""BatchSampler: batches depend on (seed, stage, step), have one bucket and whole groups, and cover each epoch once."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corefit.data.order import BatchSampler

GOLDEN = Path(__file__).parents[1] / "golden/k_repeat.json"


def sampler(*counts: int, **changes: Any) -> BatchSampler:
    """A sampler of buckets with these numbers of examples, whose indices run through all buckets."""
    ends = np.cumsum([0, *counts])
    buckets = [np.arange(low, high) for low, high in itertools.pairwise(ends)]
    given: dict[str, Any] = {"batch": 8, "group": 2, "seed": 3, "stage": "a", "order": "epochs"}
    return BatchSampler(buckets=buckets, **{**given, **changes})


@pytest.mark.parametrize(("n", "batch", "group"), [(10, 8, 2), (10, 4, 1), (3, 16, 1), (7, 6, 3), (10, 10, 1)])
def test_every_example_comes_once_in_each_epoch(n: int, batch: int, group: int) -> None:
    ours = sampler(n, batch=batch, group=group)
    steps = [ours.indices(s) for s in range(4 * n)]
    assert all(len(step) == batch for step in steps)
    assert all(len(set(step[i : i + group])) == 1 for step in steps for i in range(0, batch, group))
    drawn = [i for step in steps for i in step[::group]]
    for epoch in range(len(drawn) // n):
        assert sorted(drawn[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_every_epoch_has_another_permutation() -> None:
    ours = sampler(30, batch=30, group=1)
    assert len({tuple(ours.indices(epoch)) for epoch in range(4)}) == 4


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 40), min_size=2, max_size=5), batch=st.integers(1, 12), seed=st.integers(0, 9))
def test_every_bucket_is_sampled_in_proportion_to_its_size(counts: Sequence[int], batch: int, seed: int) -> None:
    """After e epochs each example was seen e times, except those of a batch that is not full yet."""
    ours = sampler(*counts, batch=batch, group=1, seed=seed)
    number_of = {int(n): b for b, bucket in enumerate(ours.buckets) for n in bucket}
    epochs = 6
    steps = [ours.indices(s) for s in range(sum(epochs * n // batch for n in counts))]
    assert all(len({number_of[n] for n in step}) == 1 for step in steps)
    seen: dict[int, list[int]] = {b: [] for b in range(len(counts))}
    for step in steps:
        seen[number_of[step[0]]] += step
    for bucket, numbers in seen.items():
        n = counts[bucket]
        assert len(numbers) == epochs * n // batch * batch
        for epoch in range(len(numbers) // n):
            assert sorted(numbers[epoch * n : (epoch + 1) * n]) == ours.buckets[bucket].tolist()


def test_buckets_are_shuffled_within_an_epoch() -> None:
    ours = sampler(400, 400, batch=4, group=1)
    first = [ours.indices(s)[0] < 400 for s in range(200)]
    assert sum(first) == 100
    assert 20 < sum(first[:100]) < 80


def test_permutations_differ_by_epoch_stage_and_seed_and_are_reproducible() -> None:
    def order(step: int, **changes: Any) -> list[int]:
        return sampler(30, 20, batch=50, group=1, **changes).indices(step)

    different = [order(0), order(1), order(0, seed=1), order(0, stage="b")]
    assert len(set(map(tuple, different))) == 4
    assert order(0) == different[0]


def test_a_step_does_not_depend_on_the_steps_before_it() -> None:
    code = (
        "import numpy as np; from corefit.data.order import BatchSampler;"
        "buckets = [np.arange(10), np.arange(10, 17)];"
        "print(BatchSampler(buckets=buckets, batch=8, group=2, seed=3, stage='a', order='epochs').indices(7))"
    )
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = sampler(10, 7)
    assert json.loads(fresh.stdout) == [ours.indices(step) for step in range(8)][7]


def test_independent_draws_what_the_published_sampler_draws() -> None:
    for record in json.loads(GOLDEN.read_text())["records"]:
        batch, k = record["batch"] * record["replicas"], record["k"]
        ours = sampler(record["n"], batch=batch, group=k, seed=record["seed"], order="independent").indices(
            record["epoch"]
        )
        published = [i for rank in record["per_rank_indices"] for i in rank]
        assert Counter(ours) == Counter(published)
        assert all(len(set(ours[i : i + k])) == 1 for i in range(0, batch, k))


def test_independent_draws_each_bucket_in_proportion_to_its_size() -> None:
    ours = sampler(300, 100, order="independent")
    steps = [ours.indices(s) for s in range(400)]
    first = [step[0] < 300 for step in steps]
    assert all((n < 300) == small for step, small in zip(steps, first, strict=True) for n in step)
    assert 260 < sum(first) < 340


def test_a_group_shares_one_caption_and_captions_are_drawn_uniformly() -> None:
    ours = sampler(10)
    choices = [ours.caption_choices(step) for step in range(200)]
    assert all(step[i] == step[i + 1] for step in choices for i in range(0, 8, 2))
    flat = np.array(choices)[:, ::2].ravel()
    assert np.histogram(flat, 4, (0, 1))[0].min() > 150
    assert sampler(10, seed=4).caption_choices(0) != choices[0] == sampler(10).caption_choices(0)
