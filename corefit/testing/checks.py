"""What the checks share: how they complain, the layouts they try, and other people's randomness."""

from __future__ import annotations

import random
import traceback
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

LAYOUTS: Mapping[str, tuple[int, ...]] = {
    "images [B, C, H, W]": (3, 4, 4),
    "packed tokens [B, L, C]": (16, 3),
    "video [B, C, T, H, W]": (3, 4, 2, 2),
}
"""Shapes of one row's latents with equally many elements: the same draws fill all of them."""


def expect(condition: bool, message: str) -> None:
    """AssertionError with `message` unless `condition`; unlike assert, also under python -O."""
    if not condition:
        raise AssertionError(message)


def place(error: BaseException) -> str:
    """file:line where an error came about, in a plugin's code if it passed through any."""
    import torch

    known = (Path(__file__).parents[1], Path(torch.__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not any(folder in Path(f.filename).parents for folder in known)]
    last = (theirs or frames)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


def close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether two tensors of any dtype agree to `tolerance` of the larger one's largest element, or of 1."""
    if one.shape != other.shape:
        return False
    one, other = one.detach().double(), other.detach().double()
    scale = max(1.0, float(one.abs().max()), float(other.abs().max())) if one.numel() else 1.0
    return bool(((one - other).abs() <= tolerance * scale).all())


def normal(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal draws of `shape`, float64, a function of `seed`."""
    import torch

    return torch.from_numpy(np.random.default_rng(seed).standard_normal(tuple(shape)))


@contextmanager
def global_seed(seed: int) -> Generator[None]:
    """Seed torch, numpy and random inside; put their states back afterwards."""
    import torch

    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
