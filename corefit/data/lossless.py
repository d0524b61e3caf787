"""Store the rows of a tensor in fewer bytes, and restore them to the bit.

Text encoders leave most of what they give to padding. Where padding is zeros, its positions are equal. Where it is not
(T5 without a mask, as SD3 and FLUX call it), a position of padding differs from the one before it by a few units in the
last places. So such a position is stored as that difference, every other one as it is. Then all first bytes stand
together, then all second ones, and so on: those that hold signs and exponents, and those of small differences, repeat
themselves, which zstd finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

PLAIN, CODED = b"\0", b"\1"
"""The first byte of a row that is stored as it is, and of one that is coded."""
LEVEL = 1
"""The level of zstd: higher ones make rows of embeddings no smaller."""
LOOKED_AT = 16
"""Of so many values of a position, one is looked at to choose how the position is stored."""
NEAR = 0.5
"""A position is stored as a difference if that takes less than this share of the bits of a value, on average."""
MIDDLE = 128
"""This is added to differences, so that small ones of both signs have the same bytes, except for the last."""


def code(row: bytes, shape: Sequence[int], itemsize: int) -> bytes:
    """Return a row of a tensor, [positions, ...] or one value, in fewer bytes; `itemsize` is the bytes of a value."""
    import zstd

    values = np.frombuffer(row, f"u{itemsize}").reshape(_positions(shape), -1)
    near = _near(values)
    stored = values.copy()
    stored[near] -= values[np.flatnonzero(near) - 1] - values.dtype.type(MIDDLE)
    planes = stored.reshape(-1, 1).view(np.uint8).T[::-1]
    coded = zstd.compress(np.packbits(near).tobytes() + planes.tobytes(), LEVEL)
    return CODED + coded if len(coded) < len(row) else PLAIN + row


def restore(coded: bytes, out: NDArray[np.uint8], shape: Sequence[int], itemsize: int) -> None:
    """Write the bytes of a row that `code` has stored to `out`, [bytes]; ValueError if it cannot be that row."""
    import zstd

    if coded[:1] == PLAIN:
        out[:] = np.frombuffer(coded, np.uint8, offset=1)
        return
    try:
        content = zstd.decompress(coded[1:])
    except zstd.Error as error:
        raise ValueError(str(error)) from error
    length = _positions(shape)
    flags = -(-length // 8)
    planes = np.frombuffer(content, np.uint8, offset=flags).reshape(itemsize, -1)
    values = out.view(f"u{itemsize}")
    values[:] = planes[0]
    for plane in planes[1:]:
        values <<= 8
        values |= plane
    _add_up(values.reshape(length, -1), np.unpackbits(np.frombuffer(content, np.uint8, flags), count=length))


def _positions(shape: Sequence[int]) -> int:
    return shape[0] if len(shape) > 1 and prod(shape) else 1


def _near(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Return for each position whether it is so close to the one before it that their difference takes few bits."""
    seen = values[:, ::LOOKED_AT]
    steps = (seen[1:] - seen[:-1]).view(f"i{values.itemsize}")
    bits = np.log2(np.abs(steps.astype(np.float32)) + 1).mean(1)
    return np.concatenate([[False], bits < NEAR * 8 * values.itemsize])


def _add_up(values: NDArray[Any], near: NDArray[np.uint8]) -> None:
    """Turn the positions that are `near` from differences into what they were, in place."""
    middle = values.dtype.type(MIDDLE)
    for position in np.flatnonzero(near):
        row = values[position]
        row -= middle
        row += values[position - 1]
