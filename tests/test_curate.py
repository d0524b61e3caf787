"""Conditions over metadata: what they mean, what is refused, what they leave."""

from __future__ import annotations

from typing import Any

import pytest

from corefit.curate import Column, Keep, kept
from corefit.errors import DataError


@pytest.mark.parametrize(
    ("text", "row", "holds"),
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
def test_it_means_what_python_means(text: str, row: dict[str, Any], holds: bool) -> None:
    assert Keep.of(text).holds(row) is holds


@pytest.mark.parametrize(
    "text", ["f(a)", "a.b > 1", "a >", "a + 1 > 2", "[x for x in a]", "a is None", "__import__('os')"]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write comparisons of metadata with values"):
        Keep.of(text)


def test_examples_that_cannot_be_asked_are_named() -> None:
    with pytest.raises(DataError, match="example 2 has no 'a'; it has b"):
        kept(Keep.of("a > 1"), [{"a": 2}, {"b": 2}])
    with pytest.raises(DataError, match="example 1: '>' not supported"):
        kept(Keep.of("a > 1"), [{"a": "x"}])


def test_a_histogram_counts_everything_and_what_is_kept() -> None:
    column = Column("a", [0.0] * 10 + [1.0] * 30, [False] * 20 + [True] * 20)
    lines = list(column.histogram())
    assert len(lines) == 16
    assert lines[0].endswith("0 of 10")
    assert lines[-1].endswith("20 of 30")
    assert lines[-1].count("█") == 27
    assert lines[-1].count("░") == 13
    assert list(Column("a", ["x", "y"], [True, True]).histogram()) == []
