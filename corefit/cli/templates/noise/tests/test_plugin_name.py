"""The checks that every noise weighting must pass, and tests of this one."""

from __future__ import annotations

import math

import pytest
import torch

from corefit.testing import check_noise
from corefit_plugin_name import PluginName

UNIFORM = torch.linspace(0, 1, 10_001)[1:-1]


@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 2), (0.5, 3), (3, 0.5)])
def test_it_is_a_noise_weighting(a: float, b: float):
    check_noise(PluginName(a=a, b=b))


def test_one_and_one_is_uniform():
    torch.testing.assert_close(PluginName(a=1, b=1).time(UNIFORM), UNIFORM)


@pytest.mark.parametrize(("a", "b"), [(2, 2), (2, 5), (5, 1)])
def test_its_mean_is_the_distributions(a: float, b: float):
    mean = b * math.exp(math.lgamma(1 + 1 / a) + math.lgamma(b) - math.lgamma(1 + 1 / a + b))
    assert float(PluginName(a=a, b=b).time(UNIFORM).mean()) == pytest.approx(mean, abs=1e-3)
