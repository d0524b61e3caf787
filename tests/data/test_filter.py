"""Filters over metadata: what they mean, what they refuse, and the summary of what they keep."""

from __future__ import annotations

from typing import Any

import pytest

from corefit.data.filter import Column, Filter, filter_rows
from corefit.errors import DataError


@pytest.mark.parametrize(
    ("text", "row", "matches"),
    [
        ("a >= 6.8", {"a": 6.8}, True),
        ("a >= 6.8", {"a": 6.79}, False),
        ("1 < a <= 3", {"a": 3}, True),
        ("1 < a <= 3", {"a": 1}, False),
        ("not a > 1 or b == 'x'", {"a": 2, "b": "x"}, True),
        ("not a > 1", {"a": 2}, False),
        ("not a > 1", {"a": 1}, True),
        ("not (a > 1 and b == 'x')", {"a": 2, "b": "x"}, False),
        ("a > 1 and b != 'x'", {"a": 2, "b": "x"}, False),
        ("b in ['x', 'y']", {"b": "y"}, True),
        ("b not in ('x', 'y')", {"b": "y"}, False),
        ("'cat' in tags", {"tags": ["dog", "cat"]}, True),
        ("safe", {"safe": True}, True),
        ("a > -1", {"a": 0}, True),
    ],
)
def test_a_filter_means_what_the_same_python_expression_means(text: str, row: dict[str, Any], matches: bool) -> None:
    assert Filter.parse(text).matches(row) is matches


@pytest.mark.parametrize(
    "text", ["f(a)", "a.b > 1", "a >", "a + 1 > 2", "[x for x in a]", "a is None", "__import__('os')"]
)
def test_anything_but_comparisons_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write comparisons of metadata with values"):
        Filter.parse(text)


def test_an_example_without_a_comparable_value_is_named() -> None:
    with pytest.raises(DataError, match="example 2 has no 'a'; it has b"):
        filter_rows(Filter.parse("a > 1"), [{"a": 2}, {"b": 2}])
    with pytest.raises(DataError, match="example 1: '>' not supported"):
        filter_rows(Filter.parse("a > 1"), [{"a": "x"}])


def test_nan_is_named() -> None:
    with pytest.raises(DataError, match="example 2: 'a' is NaN, which cannot be compared"):
        filter_rows(Filter.parse("a > 1"), [{"a": 2.0}, {"a": float("nan")}])
    assert filter_rows(Filter.parse("a > 1"), [{"a": 2.0, "b": float("nan")}]) == [True], "the filter does not read it"


def test_infinite_and_huge_numbers_are_compared() -> None:
    values = [float("inf"), float("-inf"), 10**400, 2.0, 0.0]
    kept = filter_rows(Filter.parse("a > 1"), [{"a": value} for value in values])
    assert kept == [True, False, True, True, False]
    lines = list(Column("a", values, kept).histogram())
    assert (lines[0][-6:], lines[-1][-6:]) == ("0 of 1", "1 of 1")


@pytest.mark.parametrize("values", [[float("inf")] * 2, [10**400, 3.0], [1e308, -1e308], [0.0, 5e-324]])
def test_values_without_bins_have_no_histogram_or_one_bin(values: list[float]) -> None:
    assert len(list(Column("a", values, [True, True]).histogram())) in (0, 16)


def test_value_ranges() -> None:
    assert Column("a", [3, 1, 2], [False] * 3).value_range() == "a is 1 to 3"
    assert Column("a", [3, "x", None, 3], [False] * 4).value_range() == "a is 3, 'x', None"
    assert Column("a", [*map(str, range(9)), 1], [False] * 10).value_range() == "a is '0', '1', '2', '3', '4', ..."
    assert Column("a", [], []).value_range() == ""


def test_a_histogram_counts_everything_and_what_is_kept() -> None:
    column = Column("a", [0.0] * 10 + [1.0] * 30, [False] * 20 + [True] * 20)
    lines = list(column.histogram())
    assert len(lines) == 16
    assert lines[0].endswith("0 of 10")
    assert lines[-1].endswith("20 of 30")
    assert lines[-1].count("█") == 27
    assert lines[-1].count("░") == 13
    assert list(Column("a", ["x", "y"], [True, True]).histogram()) == []
