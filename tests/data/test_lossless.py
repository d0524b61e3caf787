"""Captions take fewer bytes in a cache than in memory, and come back to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from corefit.data import lossless
from corefit.data.dataset import pack
from corefit.data.mds import TensorSpec
from corefit.data.texts import restore


def coded(tensor: Tensor) -> list[bytes]:
    return [lossless.code(row, tensor.shape[1:], tensor.itemsize) for row in pack(tensor)]


def back(rows: list[bytes], tensor: Tensor) -> Tensor:
    return restore(rows, TensorSpec(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape[1:])))


def noise(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def bits(tensor: Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def wandering(tokens: int, positions: int, width: int, step: float, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Text, then padding: each position of it is the one before with a little noise, as T5 without a mask gives."""
    text, first = noise(1, tokens, width, dtype=torch.float32), noise(1, 1, width, dtype=torch.float32)
    padding = first * (1 + step * noise(1, positions - tokens, width, dtype=torch.float32))
    return torch.cat([text, padding], dim=1).to(dtype)


EXTREMES = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, -1e-40, 3e38])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_bit_comes_back(dtype: torch.dtype) -> None:
    values = EXTREMES.repeat(4, 9, 16).to(dtype)
    values[1] += noise(9, 128, dtype=dtype)
    values[2, 4:] = 0
    values[3] = values[3].flip(0)
    assert torch.equal(bits(back(coded(values), values)), bits(values))


@pytest.mark.parametrize("kind", ["int64", "int32", "bool", "uint8", "float8_e4m3fn"])
def test_masks_and_sizes_come_back(kind: str) -> None:
    values = (torch.arange(3 * 64).reshape(3, 64) % 7 > 2).to(getattr(torch, kind))
    for each in (values, values.reshape(3, 8, 8), values[:, 0]):
        assert torch.equal(bits(back(coded(each), each)), bits(each))


def test_zeros_and_repeated_positions_take_nothing() -> None:
    text = noise(1, 24, 512)
    for padding in (torch.zeros(1, 488, 512).bfloat16(), noise(1, 1, 512).expand(1, 488, 512)):
        row = torch.cat([text, padding], dim=1)
        (only,) = coded(row)
        assert len(only) < 0.75 * text.nbytes + 0.003 * row.nbytes
        assert torch.equal(back([only], row), row)


def test_padding_that_hardly_changes_takes_a_few_bits() -> None:
    row = wandering(24, 512, 512, 0.01)
    (only,) = coded(row)
    assert len(only) < 0.3 * row.nbytes
    assert torch.equal(bits(back([only], row)), bits(row))
    (alone,) = coded(noise(1, 512, 512))
    assert len(alone) < 0.75 * row.nbytes, "independent values of bfloat16 have about 10.6 bits"


def test_what_would_grow_is_stored_as_it_is() -> None:
    row = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 4, 3), np.uint8))
    (only,) = coded(row)
    assert only == lossless.PLAIN + row.numpy().tobytes()
    assert torch.equal(back([only], row), row)


@pytest.mark.parametrize("harm", ["another shape", "cut", "nothing"])
def test_bytes_of_something_else_are_refused(harm: str) -> None:
    row = wandering(4, 32, 64, 0.01)
    (only,) = coded(row)
    wrong = {"another shape": only, "cut": only[:-5], "nothing": only[:1]}[harm]
    with pytest.raises(ValueError, match=r"."):
        back([wrong], row[:, 1:] if harm == "another shape" else row)
