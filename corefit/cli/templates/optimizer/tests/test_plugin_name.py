"""The checks that every optimizer must pass, and tests of this one."""

from __future__ import annotations

import pytest
import torch

from corefit.testing import check_optimizer
from corefit_plugin_name import PluginName


@pytest.mark.parametrize("keys", [{}, {"betas": (0.95, 0.98), "weight_decay": 0.0}])
def test_it_is_an_optimizer(keys: dict[str, object]):
    check_optimizer(PluginName(**keys))


def test_the_first_step_is_the_sign_of_the_gradient():
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([0.5, -3.0, 0.0])
    optimizer = PluginName(lr=0.1)
    optimizer.step(optimizer.make({"weight": weight}), torch.tensor(False))
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.1, 0.1, 0.0]))
