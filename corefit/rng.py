"""Keyed randomness: a draw is a function of (seed, stage, step, row, draw), never of rank or history.

One rank or eight, resumed or not, a sample sees the same noise, so no generator state is ever saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from attrs import define, field

if TYPE_CHECKING:
    from torch import Tensor

Key = tuple[str | int, ...]


def generator(*key: str | int) -> np.random.Generator:
    """A generator that is a function of `key` alone (Philox, keyed by a 128-bit hash)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, np.uint64)))


@define
class Rng:
    """Draws for a set of rows; the n-th call on a row gives the same numbers wherever that row is.

    key    (seed, stage, step, ...), common to all rows
    rows   global sample numbers, one for each row of what is drawn
    drawn  where the first number of each row's noise is noted, if anywhere: ranks compare theirs
    """

    key: Key
    rows: Sequence[int]
    draws: int = field(default=0, init=False)
    drawn: list[float] | None = field(default=None, kw_only=True)

    def rand(self, n: int) -> Tensor:
        """Uniform in [0, 1), [n] float32 on the CPU; n must be the number of rows."""
        return self._draw((n,), lambda g, shape: g.random(shape, np.float32))

    def randn(self, shape: Sequence[int]) -> Tensor:
        """Standard normal, `shape` = [rows, ...], float32 on the CPU."""
        return self._draw(shape, lambda g, rest: g.standard_normal(rest, np.float32))

    def integers(self, low: int, high: int) -> Tensor:
        """One integer in [low, high) a row, [rows] int64 on the CPU."""
        return self._draw((len(self.rows),), lambda g, _: g.integers(low, high))

    def __getitem__(self, rows: slice) -> Rng:
        """The same draws for a slice of the rows."""
        part = Rng(self.key, self.rows[rows], drawn=self.drawn)
        part.draws = self.draws
        return part

    def of(self, purpose: str, rows: Sequence[int] | None = None) -> Rng:
        """Draws of their own for another purpose; shared by a group where `rows` are the groups' numbers."""
        return Rng((*self.key, purpose), self.rows if rows is None else rows, drawn=self.drawn)

    def _draw(self, shape: Sequence[int], draw: Callable[[np.random.Generator, tuple[int, ...]], object]) -> Tensor:
        import torch

        if shape[0] != len(self.rows):
            raise ValueError(
                f"a keyed draw of shape {tuple(shape)} was asked for {len(self.rows)} rows; draw one value a row "
                "(first axis = rows of the part), several times if more are needed"
            )
        rest = tuple(shape[1:])
        values = [draw(generator(*self.key, int(row), self.draws), rest) for row in self.rows]
        self.draws += 1
        drawn = np.stack([np.asarray(v) for v in values])
        if self.drawn is not None and drawn.dtype.kind == "f":
            self.drawn += drawn.reshape(len(drawn), -1)[:, 0].tolist()
        return torch.from_numpy(drawn)
