"""The difference from the base as a LoRA: what is kept of it is what the singular values say."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from attrs import define
from torch import Tensor, nn

from corefit.errors import ConfigError
from corefit.run.publish.difference import Difference, difference
from corefit.run.publish.whole import Whole


@define(eq=False)
class Small:
    """A backbone of two matrices, a convolution and a norm."""

    transformer: nn.Module


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"wide": nn.Linear(12, 8), "narrow": nn.Linear(3, 8), "patch": nn.Conv2d(3, 4, 2), "norm": nn.LayerNorm(8)}
    )


def found(changed: Mapping[str, Tensor], rank: int) -> Difference:
    """The difference of a network of which some tensors have changed by what is given."""
    before = network().state_dict()
    after = {name: t + changed.get(name, 0) for name, t in before.items()}
    whole = Whole(Small(network()), before, after, {}, None)  # pyright: ignore[reportArgumentType]
    return difference(whole, before, rank, lambda done, of: None)


def noise(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(len(shape)).standard_normal(shape, "float32"))


def test_each_matrix_keeps_its_largest_singular_values() -> None:
    change = noise(8, 12)
    kept = found({"wide.weight": change}, 2)
    values = np.linalg.svd(change.numpy(), compute_uv=False) ** 2
    assert kept.kept[2] == pytest.approx(values[:2].sum() / values.sum(), rel=1e-5)
    assert kept.kept[8] == pytest.approx(1)
    a, b = kept.factors["wide"]
    assert (a.shape, b.shape) == ((2, 12), (8, 2))
    lost = (change - b @ a).square().sum() / change.square().sum()
    assert float(lost) == pytest.approx(1 - kept.kept[2], rel=1e-4)
    assert kept.factors.keys() == {"wide"}, "what has not changed needs no LoRA"


def test_a_smaller_matrix_is_kept_whole_and_filled_up_with_zeros() -> None:
    change = noise(8, 3)
    kept = found({"wide.weight": noise(8, 12), "narrow.weight": change}, 6)
    a, b = kept.factors["narrow"]
    assert (a.shape, b.shape) == ((6, 3), (8, 6))
    assert torch.allclose(b @ a, change, atol=1e-5)
    assert not a[3:].any()


def test_what_no_lora_holds_is_said_with_its_share() -> None:
    """Each change has as many numbers of size 1 as its share says."""
    ones = {"wide.weight": (8, 12), "wide.bias": (8,), "patch.weight": (4, 3, 2, 2), "norm.weight": (8,)}
    kept = found({name: torch.ones(shape) for name, shape in ones.items()}, 1)
    total = 96 + 8 + 48 + 8
    assert kept.kept[1] == pytest.approx(96 / total)
    assert kept.lost == pytest.approx({"biases": 8 / total, "convolutions": 48 / total, NORMS: 8 / total})


NORMS = "norms, tables and other vectors"


def test_equal_weights_have_no_difference() -> None:
    with pytest.raises(ConfigError, match="these weights are those of the base"):
        found({}, 1)
