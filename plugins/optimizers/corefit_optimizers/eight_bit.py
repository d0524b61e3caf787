"""AdamW with moments in 8 bits (Dettmers et al., 2022, https://arxiv.org/abs/2110.02861), by bitsandbytes."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from attrs import field, frozen, validators

from corefit import Optimizer
from corefit.errors import ConfigError
from corefit.types import step_each

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Parameter

share: Any = [validators.ge(0), validators.lt(1)]
BLOCK = 256
"""How many numbers share a scale, in bitsandbytes."""
CODES = 256
"""How many values a moment's code can stand for."""
PAGED = 100_000
"""From how many numbers on bitsandbytes pages a state."""


@frozen(kw_only=True)
class AdamW8bit(Optimizer):
    """AdamW whose moments take 2 bytes for each number that trains, in place of 8; bitsandbytes computes it.

    Each moment is an 8-bit code and a scale for each 256 numbers. Weights with few numbers have moments in float32.
    """

    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=validators.deep_iterable(share))
    """Decay rates of the running means of the gradient and of its square."""
    eps: float = field(default=1e-8, validator=validators.gt(0))
    """A small number that AdamW adds to the denominator, against division by zero."""
    weight_decay: float = field(default=1e-2, validator=validators.ge(0))
    """Decoupled weight decay, applied to all trainable weights."""
    smallest: int = field(default=4096, validator=validators.gt(0))
    """Weights with fewer numbers than this have moments in float32."""

    shards: ClassVar[Literal["no", "numbers", "blocks"]] = "blocks"
    paged: ClassVar[bool] = False

    def check(self) -> None:
        """Raise ConfigError if bitsandbytes is missing."""
        if find_spec("bitsandbytes") is None:
            raise ConfigError("bitsandbytes is not installed; pip install 'corefit[lowbit]'")

    def make(self, parameters: Mapping[str, Parameter]) -> torch.optim.Optimizer:
        import bitsandbytes

        made = _without_waits(bitsandbytes.optim.AdamW)(
            list(parameters.values()),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            optim_bits=8,
            min_8bit_size=self.smallest,
            is_paged=self.paged,
        )
        made.make_states()
        return made

    def state_bytes(self, parameter: Tensor) -> float:
        """Return the bytes of the two moments, of their scales and of what the codes stand for."""
        number = parameter.numel()
        return 8 * number if number < self.smallest else 2 * number + 2 * 4 * (-(-number // BLOCK) + CODES)

    def step(self, optimizer: torch.optim.Optimizer, unchanged: Tensor) -> None:
        step_each(optimizer, unchanged)


@frozen(kw_only=True)
class PagedAdamW8bit(AdamW8bit):
    """AdamW8bit whose moments lie in memory that the GPU shares with the CPU: where memory runs out, they make room.

    On a GPU alone; without one it is adamw8bit. The moments of a weight are copied while it is updated, so they need
    room on the GPU for the largest weight.
    """

    paged: ClassVar[bool] = True

    def state_bytes(self, parameter: Tensor) -> float:
        """Return the bytes that are never paged out: the scales, and the states of small weights."""
        paged = parameter.numel() if parameter.device.type != "cpu" else 0
        return super().state_bytes(parameter) - (2 * paged if paged >= max(self.smallest, PAGED) else 0)


def _without_waits(base: Any) -> Any:
    """Return a class of bitsandbytes whose step does not wait for the device after each parameter."""
    import torch

    class Quiet(base):
        def make_states(self) -> None:
            """Make the state of each parameter now, and not in the first step; checkpoints hold no shared memory."""
            for index, group in enumerate(self.param_groups):
                for number, parameter in enumerate(group["params"]):
                    self.init_state(group, parameter, index, number)
                    state = self.state[parameter]
                    state |= {key: state[key].clone() for key in ("qmap1", "qmap2") if key in state}

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for index, group in enumerate(self.param_groups):
                for number, parameter in enumerate(group["params"]):
                    if parameter.grad is not None:
                        self.prefetch_state(parameter)
                        self.update_step(group, parameter, index, number)

    return Quiet
