"""Two networks that are one: each sample goes through the one for its noise level (Wan 2.2 A14B)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class Experts(nn.Module):
    """`transformer` for timesteps from 1000 boundary on, `transformer_2` below, as in WanPipeline.

    How many rows go where is asked of the device: one synchronisation a call.
    """

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module, *, boundary: float) -> None:
        super().__init__()
        self.transformer = transformer
        self.transformer_2 = transformer_2
        self.boundary = 1000 * boundary

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """v of all rows, in their order.

        An expert without rows gets a gradient of 0 in place of none, so that the optimizer does with it what it does
        where other processes have rows for it.
        """
        inputs = (hidden_states, timestep, encoder_hidden_states)
        high = timestep >= self.boundary
        order = (~high).int().argsort(stable=True)
        here, anywhere = self._rows(high)
        # always in this order: sharded weights are gathered block by block, and on every rank the same ones
        made: list[Tensor] = []
        nothing = hidden_states.new_zeros(())
        for expert, rows, called in zip(self._both(), order.split(here), anywhere, strict=True):
            if len(rows):
                made.append(expert(*(t[rows] for t in inputs), return_dict=False)[0])
            elif called:
                nothing = nothing + 0 * expert(*_least(expert, *inputs), return_dict=False)[0].sum()
            elif torch.is_grad_enabled():
                nothing = nothing + _touched(expert)
        return (torch.cat(made)[order.argsort()] + nothing,)

    def _rows(self, high: Tensor) -> tuple[list[int], list[int]]:
        """How many this process has for each expert, and, sharded, how many any process has at most."""
        here = torch.stack([high.sum(), (~high).sum()])
        anywhere = here.clone()
        if isinstance(self, FSDPModule):
            dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        numbers = torch.cat([here, anywhere]).tolist()
        return numbers[:2], numbers[2:]

    # what diffusers' models offer, of both

    @property
    def peft_config(self) -> Mapping[str, Any]:
        return getattr(self.transformer, "peft_config", {})

    def add_adapter(self, config: Any, adapter_name: str = "default") -> None:
        """Add one to each."""
        for expert in self._both():
            expert.add_adapter(config, adapter_name=adapter_name)

    def set_attention_backend(self, backend: str) -> None:
        """For both."""
        for expert in self._both():
            expert.set_attention_backend(backend)

    def _both(self) -> tuple[Any, Any]:
        return self.transformer, self.transformer_2


def _least(expert: Any, x: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first row, cut down to one patch and one token of text: the weights are met, and little is computed."""
    frames, height, width = expert.config.patch_size
    return x[:1, :, :frames, :height, :width], timestep[:1], text[:1, :1]


def _touched(expert: nn.Module) -> Tensor | int:
    """0, on the graph of every weight that trains."""
    held = (p.to_local() if isinstance(p, DTensor) else p for p in expert.parameters() if p.requires_grad)
    return sum(0 * p.flatten()[:1].float().sum() for p in held)
