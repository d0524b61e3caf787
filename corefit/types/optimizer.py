"""The protocol of optimizers, AdamW, and how a step is left out without waiting for the device."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from attrs import field, frozen, validators

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Parameter

positive: Any = validators.gt(0)
share: Any = [validators.ge(0), validators.lt(1)]
FLOAT32 = 4
"""Bytes of a float32."""


@frozen(kw_only=True)
class Optimizer(ABC):
    """Makes the optimizer of a stage. It is an attrs class; its fields are the keys of an `optimizer` table.

    The three fields are keys of every optimizer. `make` and `state_bytes` are abstract and must be written; what else
    there is has defaults, which a class that derives from this one inherits.
    """

    lr: float = field(default=2e-5, validator=positive)
    """The learning rate once the warm-up is over."""
    warmup: int = field(default=0, validator=validators.ge(0))
    """Number of warm-up steps. The learning rate rises linearly from lr / warmup in the first to lr in the last."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up: stay constant, or fall along a line or a cosine towards 0."""

    shards: ClassVar[Literal["no", "numbers", "blocks"]] = "no"
    """Whether a step can be taken on each process's shards of the weights alone, which `make` is then given.

    "no"       it needs whole weights; `shard = true` is refused
    "numbers"  it treats each number by itself, and a state that is no scalar has a number for each of the shard; any
               number of processes can continue from a checkpoint
    "blocks"   its state belongs to the shard as a whole, such as one scale for each 256 numbers; as many processes must
               continue from a checkpoint as have written it
    """

    @abstractmethod
    def make(self, parameters: Mapping[str, Parameter]) -> torch.optim.Optimizer:
        """Return an optimizer of these parameters, by name, which are float32 and on the device that trains.

        Its state must be tensors and numbers, in `state` of each parameter and in `param_groups`: checkpoints hold
        both to the bit. The trainer sets "lr" in `param_groups` before each step.
        """
        ...

    @abstractmethod
    def state_bytes(self, parameter: Tensor) -> float:
        """Return the bytes of device memory that the state of one parameter takes.

        parameter  has the shape of the parameter, or of the local shard, and perhaps no values (the meta device)
        """
        ...

    def check(self) -> None:  # noqa: B027, most lack nothing
        """Raise ConfigError if something is missing that shows at once, such as a package."""

    def step(self, optimizer: torch.optim.Optimizer, unchanged: Tensor) -> None:
        """Take a step with what `make` returned; where `unchanged` (bool []) is true, leave every weight as it is.

        It is true where a gradient is not finite. The default waits for the device once in every step; `step_each`
        does not, and serves optimizers that treat each parameter by itself.
        """
        if not bool(unchanged):
            optimizer.step()

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of `step` (counted from 0) in a stage of `steps` steps.

        The rate falls as in transformers' schedules of the same names, so the last step of `linear` has the rate
        lr / (steps - warmup). The warm-up is one step ahead of theirs, whose first step has the rate 0.
        """
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, steps - self.warmup)
        fall = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return self.lr * fall[self.schedule]


@frozen(kw_only=True)
class AdamW(Optimizer):
    """AdamW with moments in float32, torch's fused one."""

    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=validators.deep_iterable(share))
    """Decay rates of the running means of the gradient and of its square."""
    eps: float = field(default=1e-8, validator=positive)
    """A small number that AdamW adds to the denominator, against division by zero."""
    weight_decay: float = field(default=1e-2, validator=validators.ge(0))
    """Decoupled weight decay, applied to all trainable weights."""

    shards: ClassVar[Literal["no", "numbers", "blocks"]] = "numbers"

    def make(self, parameters: Mapping[str, Parameter]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(
            list(parameters.values()),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=True,
        )

    def state_bytes(self, parameter: Tensor) -> float:
        """Return the bytes of the two moments."""
        return 2 * FLOAT32 * parameter.numel()

    def step(self, optimizer: torch.optim.Optimizer, unchanged: Tensor) -> None:
        """Take a step; the fused kernel itself leaves weights and state as they are where `unchanged` is true."""
        optimizer.found_inf = unchanged.float()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()


def step_each(optimizer: torch.optim.Optimizer, unchanged: Tensor) -> None:
    """Take a step one parameter at a time, and put weight and state back where `unchanged` (bool []) is true.

    The device decides, and nothing waits for it; the copies to put back take the memory of one parameter and its state.
    It serves optimizers that treat each parameter by itself and whose state starts at 0. Where a step is left out, the
    optimizer sees a gradient of 0. What is not on the device goes on so: numbers in the state, such as the count of
    steps, and tensors in other memory, such as moments that are paged.
    """
    groups = optimizer.param_groups
    try:
        for group in groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    optimizer.param_groups = [{**group, "params": [parameter]}]
                    _step_one(optimizer, parameter, unchanged)
    finally:
        optimizer.param_groups = groups


def _step_one(optimizer: torch.optim.Optimizer, parameter: Parameter, unchanged: Tensor) -> None:
    import torch

    assert parameter.grad is not None, "a parameter without a gradient takes no step"
    parameter.grad.masked_fill_(unchanged, 0)
    before = {key: tensor.clone() for key, tensor in _tensors(optimizer, parameter).items()}
    optimizer.step()
    for key, tensor in _tensors(optimizer, parameter).items():
        old = before[key] if key in before else torch.zeros_like(tensor)  # the first step makes the state
        tensor.copy_(torch.where(unchanged, old, tensor))


def _tensors(optimizer: torch.optim.Optimizer, parameter: Parameter) -> dict[str, Tensor]:
    """Return a parameter and the tensors of its state on its device, by key; the parameter's own key is ""."""
    import torch

    state: Mapping[str, Any] = optimizer.state.get(parameter, {})
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return {"": parameter.detach(), **{k: t for k, t in tensors.items() if t.device == parameter.device}}
