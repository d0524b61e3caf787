"""Helpers that all checks share: raising errors, latent layouts to try, comparing tensors, global seeds."""

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
"""Shapes of one row's latents, all with the same number of elements, so that the same draws fill each of them."""


def expect(condition: bool, message: str) -> None:
    """Raise AssertionError with `message` unless `condition`; unlike assert, it also works under python -O."""
    if not condition:
        raise AssertionError(message)


def place(error: BaseException) -> str:
    """Return the "file:line" that raised an error: the innermost line of a plugin, if it passed through one."""
    import torch

    known = (Path(__file__).parents[1], Path(torch.__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not any(folder in Path(f.filename).parents for folder in known)]
    last = (theirs or frames)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


def close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Return whether two tensors agree up to `tolerance` times the largest absolute element of both, or times 1."""
    if one.shape != other.shape:
        return False
    one, other = one.detach().double(), other.detach().double()
    scale = max(1.0, float(one.abs().max()), float(other.abs().max())) if one.numel() else 1.0
    return bool(((one - other).abs() <= tolerance * scale).all())


def normal(seed: int, shape: Sequence[int]) -> Tensor:
    """Return standard normal draws of `shape` in float64 that depend on `seed` alone."""
    import torch

    return torch.from_numpy(np.random.default_rng(seed).standard_normal(tuple(shape)))


@contextmanager
def global_seed(seed: int) -> Generator[None]:
    """Seed torch, numpy and random inside the block, and restore their states afterwards."""
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
