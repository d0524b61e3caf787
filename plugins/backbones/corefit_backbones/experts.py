"""The two networks of Wan 2.2 A14B as one module: each sample goes through the one for its noise level."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class Experts(nn.Module):
    """`transformer` for timesteps of at least 1000 boundary, `transformer_2` for the others, as in WanPipeline.

    The number of rows for each expert is read from the device, which is one synchronization per call.
    """

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module, *, boundary: float) -> None:
        super().__init__()
        self.transformer = transformer
        self.transformer_2 = transformer_2
        self.boundary = 1000 * boundary

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """v [B, ...] of all rows, in their order.

        An expert without rows gets a gradient of 0 and not None, so that the optimizer treats it as on those processes
        that have rows for it.
        """
        inputs = (hidden_states, timestep, encoder_hidden_states)
        high = timestep >= self.boundary
        order = (~high).int().argsort(stable=True)
        here, anywhere = self._rows(high)
        # every rank calls the experts in this order, because sharded weights are gathered on all ranks together
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
        """Number of rows for each expert in this process, and the largest of all processes if weights are sharded."""
        here = torch.stack([high.sum(), (~high).sum()])
        anywhere = here.clone()
        if isinstance(self, FSDPModule):
            dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        numbers = torch.cat([here, anywhere]).tolist()
        return numbers[:2], numbers[2:]

    # the members of diffusers' models that corefit uses, for both experts

    @property
    def peft_config(self) -> Mapping[str, Any]:
        return getattr(self.transformer, "peft_config", {})

    def add_adapter(self, config: Any, adapter_name: str = "default") -> None:
        """Add an adapter to each expert."""
        for expert in self._both():
            expert.add_adapter(config, adapter_name=adapter_name)

    def set_attention_backend(self, backend: str) -> None:
        """Set the attention backend of both experts."""
        for expert in self._both():
            expert.set_attention_backend(backend)

    def _both(self) -> tuple[Any, Any]:
        return self.transformer, self.transformer_2


def _least(expert: Any, x: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first row, cut to one patch and one token of text: all weights are used, and little is computed.

    A row that processes share cannot be cut.
    """
    if getattr(expert, "_parallel_config", None) is not None:
        return x[:1], timestep[:1], text[:1]
    frames, height, width = expert.config.patch_size
    return x[:1, :, :frames, :height, :width], timestep[:1], text[:1, :1]


def _touched(expert: nn.Module) -> Tensor | int:
    """A 0 that depends on every trainable weight, which gives each a gradient of 0."""
    held = (p.to_local() if isinstance(p, DTensor) else p for p in expert.parameters() if p.requires_grad)
    return sum(0 * p.flatten()[:1].float().sum() for p in held)
