"""Two networks that are one: each sample goes through the one for its noise level (Wan 2.2 A14B)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from corefit.errors import ModelError


class Experts(nn.Module):
    """`transformer` for timesteps from 1000 boundary on, `transformer_2` below, as in WanPipeline.

    Which rows go where is asked of the device: one synchronisation a call.
    """

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module, *, boundary: float) -> None:
        super().__init__()
        self.transformer = transformer
        self.transformer_2 = transformer_2
        self.boundary = 1000 * boundary

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """v of all rows, in their order."""
        if isinstance(self, FSDPModule):
            raise ModelError(
                "shard = true is not for a model of two experts yet: two processes were found to train otherwise than "
                "one; leave it out (DDP), and train a LoRA where memory is short"
            )
        inputs = (hidden_states, timestep, encoder_hidden_states)
        high = timestep >= self.boundary
        shares = [(self.transformer, high.nonzero()[:, 0]), (self.transformer_2, (~high).nonzero()[:, 0])]
        busy = [(expert, rows) for expert, rows in shares if len(rows)]
        made = [expert(*(t[rows] for t in inputs), return_dict=False)[0] for expert, rows in busy]
        v = torch.cat(made)[torch.cat([rows for _, rows in busy]).argsort()]
        idle = [expert for expert, rows in shares if not len(rows)]
        if idle and torch.is_grad_enabled() and dist.is_initialized() and dist.get_world_size() > 1:
            # other ranks may need it now, and its gradient must be exchanged: one row that counts for nothing
            v = v + 0 * idle[0](*(t[:1] for t in inputs), return_dict=False)[0].sum()
        return (v,)

    @property
    def busiest(self) -> nn.Module:
        """One that all rows of a batch may go through: what a step takes of memory is estimated from it."""
        return self.transformer

    # what diffusers' models offer, of both

    @property
    def peft_config(self) -> Mapping[str, Any]:
        return getattr(self.transformer, "peft_config", {})

    def add_adapter(self, config: Any, adapter_name: str = "default") -> None:
        """Add one to each."""
        for expert in self._both():
            expert.add_adapter(config, adapter_name=adapter_name)

    def enable_gradient_checkpointing(self) -> None:
        """For both."""
        for expert in self._both():
            expert.enable_gradient_checkpointing()

    def set_attention_backend(self, backend: str) -> None:
        """For both."""
        for expert in self._both():
            expert.set_attention_backend(backend)

    def _both(self) -> tuple[Any, Any]:
        return self.transformer, self.transformer_2
