"""The checks that every objective must pass, and tests of this one."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import huber_loss

from corefit.flow import interpolate, per_sample
from corefit.testing import ToyBackbone, check_objective, toy_batch, toy_context
from corefit_plugin_name import PluginName


@pytest.mark.parametrize("delta", [0.02, 0.1, 1.0])
def test_it_is_an_objective(delta: float):
    check_objective(PluginName(delta=delta))


def backbone() -> ToyBackbone:
    toy = ToyBackbone()
    toy.load(torch.device("cpu"), torch.float32)
    return toy


@pytest.mark.parametrize("delta", [0.02, 0.5, 100.0])
def test_its_loss_is_torchs(delta: float):
    batch, ctx = toy_batch(backbone(), 8), toy_context(backbone(), range(8))
    noise, sigma = ctx.randn_like(batch.clean), ctx.sigma(batch.clean)
    v = ctx.backbone.velocity(interpolate(batch.clean, noise, sigma), sigma, batch.cond)
    expected = per_sample(huber_loss(v, noise - batch.clean, reduction="none", delta=delta)).sum()

    again = toy_context(backbone(), range(8))  # draws the same noise
    (term,) = PluginName(delta=delta).terms(batch, again)
    torch.testing.assert_close(term.total, expected)
    assert term.count == 8
