"""Keyed randomness: a random draw is a function of (seed, stage, step, row, draw number), never of rank or history.

A sample gets the same noise on one rank and on eight, resumed or not, so no generator state is ever saved.
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
    """Return a generator that depends on `key` alone (Philox, keyed by a 128-bit hash)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, np.uint64)))


@define
class Rng:
    """Draws random numbers for a set of rows; the n-th draw of a row is the same in whichever batch the row is.

    key    (seed, stage, step, ...), common to all rows
    rows   global sample numbers, one for each row that is drawn
    draws  the number of draws so far
    drawn  a list to which the leading number of each row's draw is appended, so that ranks can compare theirs; or None
    """

    key: Key
    rows: Sequence[int]
    draws: int = field(default=0, init=False)
    drawn: list[float] | None = field(default=None, kw_only=True)

    def rand(self, n: int) -> Tensor:
        """Draw uniform numbers in [0, 1), [n] float32 on the CPU; n must be the number of rows."""
        return self._draw((n,), lambda g, shape: g.random(shape, np.float32))

    def randn(self, shape: Sequence[int]) -> Tensor:
        """Draw standard normal numbers, `shape` = [rows, ...], float32 on the CPU."""
        return self._draw(shape, lambda g, rest: g.standard_normal(rest, np.float32))

    def integers(self, low: int, high: int) -> Tensor:
        """Draw one integer in [low, high) for each row, [rows] int64 on the CPU."""
        return self._draw((len(self.rows),), lambda g, _: g.integers(low, high))

    def __getitem__(self, rows: slice) -> Rng:
        """Return an Rng that gives a slice of the rows the same draws as this one."""
        sliced = Rng(self.key, self.rows[rows], drawn=self.drawn)
        sliced.draws = self.draws
        return sliced

    def of(self, purpose: str, rows: Sequence[int] | None = None) -> Rng:
        """Return an Rng with independent draws for another purpose.

        rows  rows to draw for instead; the numbers of groups here give all samples of a group the same draw
        """
        return Rng((*self.key, purpose), self.rows if rows is None else rows, drawn=self.drawn)

    def _draw(self, shape: Sequence[int], draw: Callable[[np.random.Generator, tuple[int, ...]], object]) -> Tensor:
        import torch

        if shape[0] != len(self.rows):
            raise ValueError(
                f"a keyed draw has shape {tuple(shape)}, but there are {len(self.rows)} rows; the first axis must be "
                "the rows of the part. If a row needs several values, draw several times"
            )
        rest = tuple(shape[1:])
        values = [draw(generator(*self.key, int(row), self.draws), rest) for row in self.rows]
        self.draws += 1
        drawn = np.stack([np.asarray(v) for v in values])
        if self.drawn is not None and drawn.dtype.kind == "f":
            self.drawn += drawn.reshape(len(drawn), -1)[:, 0].tolist()
        return torch.from_numpy(drawn)
