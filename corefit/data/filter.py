"""Which examples are kept: a condition over their metadata and scores, and what it leaves."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import field, frozen

from corefit.errors import DataError, shown

COMPARED: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda one, other: one in other,
    ast.NotIn: lambda one, other: one not in other,
}
BINS, BAR = 16, 40
WIDEST = 1e300
"""Larger values are in no bin: the width of all bins together must be a number."""
WRITTEN = 'write comparisons of metadata with values, such as aesthetic >= 6.8 and category != "logo"'


@frozen
class Keep:
    """A condition such as `aesthetic >= 6.8 and category in ["cat", "dog"]`.

    Comparisons of names with constants, joined by and, or, not; ValueError for anything else.
    """

    text: str
    _tree: ast.expr = field(eq=False, repr=False)

    @staticmethod
    def of(text: str) -> Keep:
        """`text`, understood."""
        try:
            tree = ast.parse(text, mode="eval").body
            _check(tree, text)
        except SyntaxError as error:
            raise ValueError(f"{shown(text)} is no condition ({error.msg}); {WRITTEN}") from None
        except (RecursionError, MemoryError):
            raise ValueError(f"{shown(text)} is too deep to be understood; {WRITTEN}") from None
        return Keep(text, tree)

    @property
    def names(self) -> list[str]:
        """What it reads, in order."""
        return list(dict.fromkeys(node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name)))

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether it is true of one example; LookupError for a name that has no value, TypeError as Python's."""
        return bool(_value(self._tree, values))


@frozen
class Column:
    """The values of one name over all examples, and which of them are kept."""

    name: str
    values: Sequence[Any]
    kept: Sequence[bool]

    def span(self) -> str:
        """From the least value to the greatest where they can be compared, the first few elsewhere."""
        try:
            return f"{self.name} is {shown(min(self.values))} to {shown(max(self.values))}" if self.values else ""
        except TypeError:
            few = dict.fromkeys(shown(value) for value in self.values)
            return f"{self.name} is {', '.join(list(few)[:5])}{', ...' if len(few) > 5 else ''}"

    def histogram(self) -> Iterator[str]:
        """A line a bin: its bounds, a bar whose full part is kept, counts. Nothing where values are no numbers.

        Infinite values, and those above WIDEST, are in no bin.
        """
        if not all(isinstance(value, (int, float)) for value in self.values):
            return
        values, kept = np.array([_real(value) for value in self.values]), np.array(self.kept, bool)
        finite = np.isfinite(values) & (np.abs(values) < WIDEST)
        try:
            counts, edges = np.histogram(values[finite], BINS)
        except ValueError:  # of values that are too near each other for bins between them
            return
        left, _ = np.histogram(values[finite & kept], edges)
        for low, high, count, held in zip(edges, edges[1:], counts, left, strict=False):
            full, whole = (-(-int(n) * BAR // max(1, int(counts.max()))) for n in (held, count))
            yield f"{low:10.4g} .. {high:<10.4g} {'█' * full + '░' * (whole - full):{BAR}} {held} of {count}"


def _real(value: float) -> float:
    """A number as a float, infinity where it is beyond all of them."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def kept(keep: Keep, rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Which of the examples, by their metadata, a condition keeps; DataError names one that it cannot be asked of."""
    return [_asked(keep, number, row) for number, row in enumerate(rows)]


def _asked(keep: Keep, number: int, row: Mapping[str, Any]) -> bool:
    if unknown := [name for name in keep.names if row.get(name) != row.get(name)]:
        raise DataError(
            f"keep = {keep.text!r}: example {number + 1}: {unknown[0]!r} is NaN, which is neither more nor less than "
            "anything; give it a value, or leave the example out"
        )
    try:
        return keep.holds(row)
    except LookupError as error:
        raise DataError(
            f"keep = {keep.text!r}: example {number + 1} has no {error.args[0]!r}; it has "
            f"{', '.join(row) or 'nothing'}. Name what every example has, or let a reward make it ([data] score)"
        ) from None
    except TypeError as error:
        raise DataError(f"keep = {keep.text!r}: example {number + 1}: {error}") from None


def _check(node: ast.expr, text: str) -> None:
    match node:
        case ast.BoolOp(values=parts):
            for part in parts:
                _check(part, text)
        case ast.UnaryOp(op=ast.Not(), operand=part):
            _check(part, text)
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in COMPARED for op in ops):
            for part in (left, *others):
                if not isinstance(part, ast.Name):
                    _constant(part, text)
        case ast.Name():
            pass
        case _:
            raise ValueError(f"{text!r}: {ast.unparse(node)!r} is not understood; {WRITTEN}")


def _constant(node: ast.expr, text: str) -> None:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ValueError(f"{text!r}: {ast.unparse(node)!r} is no name and no value; {WRITTEN}") from None


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    match node:
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(_value(part, values) for part in parts)
        case ast.BoolOp(values=parts):
            return any(_value(part, values) for part in parts)
        case ast.UnaryOp(op=ast.Not(), operand=part):
            return not _value(part, values)
        case ast.Compare(left=left, ops=ops, comparators=others):
            terms = [_value(part, values) for part in (left, *others)]
            return all(COMPARED[type(op)](a, b) for op, a, b in zip(ops, terms, terms[1:], strict=False))
        case ast.Name(id=name):
            return values[name]
        case _:
            return ast.literal_eval(node)
