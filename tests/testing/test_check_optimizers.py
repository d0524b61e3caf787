"""check_optimizer finds optimizers that would train wrongly, and says what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from attrs import frozen
from torch import Tensor
from torch.nn import Parameter

from corefit.testing import check_optimizer
from corefit.types import Optimizer, step_each


@frozen(kw_only=True)
class Plain(Optimizer):
    """Gradient descent with momentum, and with one fault."""

    fault: str = ""
    shards: ClassVar[Any] = "numbers"

    def make(self, parameters: Mapping[str, Parameter]) -> torch.optim.Optimizer:
        given = list(parameters.values())[: -1 if self.fault == "parameter" else None]
        return Descent(given, self.lr, self.fault)

    def state_bytes(self, parameter: Tensor) -> float:
        return parameter.numel() * (8 if self.fault == "bytes" else 4)

    def step(self, optimizer: torch.optim.Optimizer, unchanged: Tensor) -> None:
        if self.fault == "waits":
            Optimizer.step(self, optimizer, unchanged)
        elif self.fault == "left out":
            optimizer.step()
        else:
            step_each(optimizer, unchanged)


class Descent(torch.optim.Optimizer):
    def __init__(self, parameters: list[Parameter], lr: float, fault: str) -> None:
        super().__init__(parameters, {"lr": lr})
        self.fault, self.hidden = fault, dict[Parameter, Tensor]()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                assert p.grad is not None
                held = self.hidden if self.fault == "hidden" else self.state[p]
                key: Any = p if self.fault == "hidden" else "momentum"
                held[key] = held.get(key, torch.zeros_like(p)) * 0.9 + p.grad
                if self.fault == "shape":
                    self.state[p]["norm"] = p.grad.norm(keepdim=True).flatten()
                if self.fault == "read":
                    float(p.grad.sum())
                rate = 1e-2 if self.fault == "rate" else group["lr"]
                p.add_(held[key], alpha=rate if self.fault == "sign" else -rate)


SAID = {
    "parameter": "param_groups do not hold each parameter once",
    "sign": "along its gradient, not against it",
    "rate": r'weights move where group\["lr"\] is 0',
    "left out": "changes weights although `unchanged` is true",
    "hidden": "stopped after two steps and continued ends in other weights|NaN of a step that was left out",
    "shape": "the state 'norm' of a weight of shape",
    "bytes": "state_bytes says 62376 bytes for weights whose state takes 31188",
    "read": r"float\(tensor\) at test_check_optimizers.py:\d+ makes the host wait",
    "waits": r"bool\(tensor\).* makes the host wait",
}


def test_no_false_alarm() -> None:
    check_optimizer(Plain())
    check_optimizer(Plain(fault="waits"), waits=True)


@pytest.mark.parametrize("fault", SAID)
def test_a_fault_is_named(fault: str) -> None:
    with pytest.raises(AssertionError, match=f"^Plain: .*({SAID[fault]})"):
        check_optimizer(Plain(fault=fault))
