"""The difference of weights from the base as a LoRA: of each matrix, its best approximation of a given rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from attrs import frozen

from corefit.errors import ConfigError
from corefit.run.publish.whole import Whole, modules_of
from corefit.types import StoredTensors

if TYPE_CHECKING:
    from torch import Tensor

Factors = Mapping[str, tuple["Tensor", "Tensor"]]
"""Maps the name of a module to A [rank, in] and B [out, rank]; B @ A is added to its weight."""
SHOWN = (4, 8, 16, 32, 64, 128, 256, 512)
"""Ranks for which it is said how much they would keep."""


@frozen(eq=False)
class Difference:
    """What a LoRA of a given rank keeps of the difference of weights from the base.

    Shares are of the sum of squares of all numbers of the difference, the square of its Frobenius norm.

    kept  the share that matrices keep at each rank, for the ranks of SHOWN and the one asked for
    lost  the share of what no LoRA holds, by kind: biases, convolutions, norms and other vectors
    """

    factors: Factors
    kept: Mapping[int, float]
    lost: Mapping[str, float]


def difference(whole: Whole, base: StoredTensors, rank: int, advance: Callable[[int, int], None]) -> Difference:
    """Approximate the difference of each matrix by one of the given rank, in float32, on a GPU if there is one.

    Every factor has the same rank, filled with zeros where the matrix is smaller: readers take one scale for all.

    advance  is called with (tensors done, of how many)
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    matrices = _matrices(whole)
    _check_rank(rank, whole, matrices)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    spectrum = torch.zeros(max(min(whole.shape(name)) for name in matrices), dtype=torch.float64)
    others, names = defaultdict[str, float](float), whole.names
    for done, name in enumerate(names, 1):
        changed = whole[name].to(device).float() - base[name][...].to(device).float()
        if name not in matrices:
            others[_kind(name, changed)] += float(changed.double().square().sum())
        elif changed.any():
            u, s, v = torch.linalg.svd(changed, full_matrices=False)
            spectrum[: len(s)] += s.double().square().cpu()
            factors[name.removesuffix(".weight")] = _factors(u, s, v, rank)
        advance(done, len(names))
    total = float(spectrum.sum()) + sum(others.values())
    if not total:
        raise ConfigError("these weights are those of the base: there is no difference to export")
    held = spectrum.cumsum(0) / total
    ranks = sorted({*(shown for shown in SHOWN if shown <= len(spectrum)), rank})
    lost = {kind: square / total for kind, square in others.items() if square}
    return Difference(factors, {shown: float(held[shown - 1]) for shown in ranks}, lost)


def _matrices(whole: Whole) -> set[str]:
    """Return the names of the weights of linear layers, which a LoRA can change."""
    from torch import nn

    modules = modules_of(whole.backbone).items()
    return {f"{name}.weight" for name, module in modules if isinstance(module, nn.Linear)}


def _check_rank(rank: int, whole: Whole, matrices: set[str]) -> None:
    widest = max((min(whole.shape(name)) for name in matrices), default=0)
    if rank > widest:
        raise ConfigError(f"--rank {rank}: no matrix of this network has a rank above {widest}; give that or less")


def _factors(u: Tensor, s: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A [rank, in] and B [out, rank], each with the root of the singular values, from changed = u diag(s) v."""
    from torch.nn.functional import pad

    root = s[:rank].sqrt()
    missing = rank - len(root)
    a, b = pad(root[:, None] * v[:rank], (0, 0, 0, missing)), pad(u[:, :rank] * root, (0, missing))
    return a.contiguous().cpu(), b.contiguous().cpu()


def _kind(name: str, tensor: Tensor) -> str:
    """Say what a tensor is that a LoRA cannot change."""
    if name.endswith(".bias"):
        return "biases"
    return "convolutions" if tensor.ndim > 3 else "norms, tables and other vectors"
