"""The checks that every sampler must pass, and tests of this one."""

from __future__ import annotations

import pytest
import torch

from corefit.flow import interpolate
from corefit.testing import check_sampler
from corefit_plugin_name import PluginName

SIGMA, AFTER = torch.tensor([1.0, 0.6, 0.2]), torch.tensor([0.8, 0.5, 0.0])


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_it_is_a_sampler(eta: float):
    check_sampler(PluginName(eta=eta))


def test_without_overshoot_it_is_euler():
    x0, noise = torch.full((3, 4), 2.0), torch.full((3, 4), -1.0)
    step = PluginName(eta=0).step(interpolate(x0, noise, SIGMA), noise - x0, SIGMA, AFTER)
    torch.testing.assert_close(step.mean, interpolate(x0, noise, AFTER))
    assert step.std.tolist() == [0, 0, 0]


def test_more_overshoot_is_more_noise_and_none_at_the_end():
    x = torch.zeros(3, 4)
    less, more = (PluginName(eta=eta).step(x, x, SIGMA, AFTER).std for eta in (0.3, 0.9))
    assert (more > less).tolist() == [True, True, False]
    assert float(more[-1]) == 0
