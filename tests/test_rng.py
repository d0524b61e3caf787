"""Draws are a function of their key alone: not of rank, batch, order or history."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corefit.rng import Rng, generator

KEY = (7, "soar", 3)


def draws(rng):
    """One of each kind."""
    n = len(rng.rows)
    return rng.rand(n), rng.randn((n, 2, 3)), rng.integers(0, 1000)


@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=8, unique=True), st.data())
def test_a_row_sees_the_same_draws_wherever_it_is(rows, data):
    others = data.draw(st.permutations(rows))
    here, there = draws(Rng(KEY, rows)), draws(Rng(KEY, others))
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a, b[[others.index(row) for row in rows]])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_number_of_ranks_does_not_matter(ranks):
    rows, share = list(range(16, 24)), 8 // ranks
    parts = [draws(Rng(KEY, rows[r * share : (r + 1) * share])) for r in range(ranks)]
    for whole, split in zip(draws(Rng(KEY, rows)), zip(*parts, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(split))


@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_slice_goes_on_where_the_whole_is(before):
    """Micro-batches, after some draws were made for all rows."""
    whole = Rng(KEY, range(6))
    for _ in range(before):
        whole.rand(6)
    parts = [whole[0:4], whole[4:6]]
    split = torch.cat([part.rand(len(part.rows)) for part in parts])
    assert torch.equal(whole.rand(6), split)


def test_slicing_does_not_draw():
    rng = Rng(KEY, range(4))
    rng[0:2].rand(2)
    assert torch.equal(rng.rand(4), Rng(KEY, range(4)).rand(4))


@pytest.mark.parametrize(
    "other",
    [(8, "soar", 3), (7, "sft", 3), (7, "soar", 4), (7, "soar", 3, 0), (7, "soar"), ("7", "soar", 3), (7, "soar3")],
    ids=repr,
)
def test_other_keys_give_other_draws(other):
    assert not (Rng(KEY, range(8)).rand(8) == Rng(other, range(8)).rand(8)).any()


def test_no_two_values_of_many_draws_agree():
    """Rows, calls and positions are all told apart: a collision would repeat a draw."""
    rng = Rng(KEY, range(50))
    values = torch.cat([rng.randn((50, 10)).double() for _ in range(4)])
    assert len(values.unique()) == values.numel()


def test_the_key_is_no_concatenation():
    """(1, 23) and (12, 3) are different rows and draws."""
    assert generator("a", 1, 23).random() != generator("a", 12, 3).random()
    assert generator("a", "b").random() != generator("a', 'b").random()


def test_a_groups_draw_is_every_members():
    rng = Rng(KEY, range(6))
    shared = rng.of("g", [row // 3 for row in rng.rows]).rand(6)
    assert torch.equal(shared[:3], shared[:1].expand(3))
    assert torch.equal(shared[3:], shared[3:4].expand(3))
    assert shared[0] != shared[3]


def test_a_groups_draw_is_not_its_numbers_own_draw():
    """Group 0's draw must not be row 0's: the one chooses windows, the other is noise."""
    rng = Rng(KEY, [0, 1])
    assert not (rng.of("g", [0, 1]).rand(2) == rng.rand(2)).any()


def test_a_groups_draw_does_not_depend_on_the_slice():
    """A group may be cut by a micro-batch."""
    rng = Rng(KEY, range(6))
    cut = [rng[s].of("g", [row // 3 for row in rng[s].rows]).rand(len(rng[s].rows)) for s in (slice(0, 4), slice(4, 6))]
    assert torch.equal(rng.of("g", [row // 3 for row in rng.rows]).rand(6), torch.cat(cut))


def test_uniform_draws():
    values = Rng(KEY, range(4000)).rand(4000)
    assert (values.dtype, values.shape) == (torch.float32, (4000,))
    assert ((values >= 0) & (values < 1)).all()
    assert float(values.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(values.std()) == pytest.approx(12**-0.5, abs=0.02)


def test_normal_draws():
    values = Rng(KEY, range(40)).randn((40, 4, 5, 5))
    assert (values.dtype, values.shape) == (torch.float32, (40, 4, 5, 5))
    assert float(values.mean()) == pytest.approx(0, abs=0.06)
    assert float(values.std()) == pytest.approx(1, abs=0.05)
    together = torch.corrcoef(values.flatten(1))
    assert float((together - torch.eye(40)).abs().max()) < 0.5  # rows are not copies of each other


def test_integer_draws():
    values = Rng(KEY, range(500)).integers(2, 5)
    assert values.dtype == torch.int64
    assert values.unique().tolist() == [2, 3, 4]


@pytest.mark.parametrize("ask", [lambda rng: rng.rand(3), lambda rng: rng.randn((3, 2)), lambda rng: rng.randn((1, 4))])
def test_one_draw_a_row_or_an_error(ask):
    with pytest.raises(ValueError, match="there are 4 rows; the first axis must be the rows"):
        ask(Rng(KEY, range(4)))


def test_another_process_draws_the_same():
    """Nothing of Python's hash seed or of this process may enter."""
    code = "from corefit.rng import generator; print(generator(7, 'soar', 3, 5, 0).standard_normal(4, 'f4').tolist())"
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert told.strip() == str(Rng(KEY, [5]).randn((1, 4))[0].tolist())


def test_draws_of_a_release_are_those_of_the_next():
    """A resumed run must go on with the same noise: changing the generator changes every run's results."""
    normal = Rng((0, "stage", 0), [0, 1]).randn((2, 2))
    torch.testing.assert_close(normal, torch.tensor([[-0.30394346, -1.09183574], [0.45542005, -1.44899035]]))
    uniform = Rng((0, "stage", 0), [0, 1]).rand(2)
    torch.testing.assert_close(uniform, torch.tensor([0.22333199, 0.22274852]))
