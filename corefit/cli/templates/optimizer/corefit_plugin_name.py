"""plugin_name, an optimizer for corefit: Lion (Chen et al., 2023, https://arxiv.org/abs/2302.06675)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from attrs import field, frozen, validators

from corefit import Offers, Optimizer, hookimpl
from corefit.types import step_each

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Parameter

COREFIT_API = "1.0"
share: Any = [validators.ge(0), validators.lt(1)]


@frozen(kw_only=True)
class PluginName(Optimizer):
    """Lion: every number moves by the learning rate, in the direction of the sign of a momentum."""

    betas: tuple[float, float] = field(default=(0.9, 0.99), validator=validators.deep_iterable(share))
    """Decay rates of the momentum: as it is used for a step, and as it is kept."""
    weight_decay: float = field(default=1e-2, validator=validators.ge(0))
    """Decoupled weight decay, applied to all trainable weights."""

    shards: ClassVar[Literal["no", "numbers", "blocks"]] = "numbers"

    def make(self, parameters: Mapping[str, Parameter]) -> torch.optim.Optimizer:
        return _made(self, parameters)

    def state_bytes(self, parameter: Tensor) -> float:
        return 4 * parameter.numel()  # the momentum

    def step(self, optimizer: torch.optim.Optimizer, unchanged: Tensor) -> None:
        step_each(optimizer, unchanged)  # no weight may change where a gradient is not finite


def _made(keys: PluginName, parameters: Mapping[str, Parameter]) -> torch.optim.Optimizer:
    import torch

    class Lion(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            used, kept = keys.betas
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    direction = state["momentum"].lerp(p.grad, 1 - used).sign()
                    state["momentum"].lerp_(p.grad, 1 - kept)
                    p.mul_(1 - group["lr"] * keys.weight_decay).sub_(direction, alpha=group["lr"])

    return Lion(list(parameters.values()), {"lr": keys.lr})


@hookimpl
def corefit_optimizers() -> Offers[Optimizer]:
    return {"plugin_name": PluginName}
