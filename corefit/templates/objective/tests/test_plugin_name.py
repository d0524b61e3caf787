"""What every objective must hold, and what this one says of itself."""

from __future__ import annotations

import pytest
import torch

from corefit.flow import mix, per_sample
from corefit.testing import ToyBackbone, check_objective, toy_batch, toy_context
from corefit_plugin_name import PluginName


@pytest.mark.parametrize("delta", [0.02, 0.1, 1.0])
def test_it_is_an_objective(delta: float):
    check_objective(PluginName(delta=delta))


def loss(objective: PluginName) -> float:
    (term,) = objective.terms(toy_batch(backbone(), 8), toy_context(backbone(), range(8)))
    return float(term.total.detach())


def backbone() -> ToyBackbone:
    toy = ToyBackbone()
    toy.load(torch.device("cpu"), torch.float32)
    return toy


def test_below_delta_it_is_half_the_squared_error():
    batch, ctx = toy_batch(backbone(), 8), toy_context(backbone(), range(8))
    noise, sigma = ctx.randn_like(batch.clean), ctx.sigma(batch.clean)
    v = ctx.backbone.velocity(mix(batch.clean, noise, sigma), sigma, batch.cond)
    expected = per_sample((v - (noise - batch.clean)) ** 2).sum() / 2
    assert loss(PluginName(delta=1e3)) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_above_delta_it_grows_with_delta():
    small, twice = (loss(PluginName(delta=delta)) for delta in (1e-4, 2e-4))
    assert twice == pytest.approx(2 * small, rel=1e-2)
