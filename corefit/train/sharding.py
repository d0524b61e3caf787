"""Weights that are split over the ranks (FSDP2): how they are cut and read, and when they are gathered and exchanged.

FSDP2 gathers a block's weights before its forward and again before its backward, and exchanges its gradient after that.
A step of several forwards and backwards would pay for each of them. So within a step weights stay gathered, and
gradients whole, where memory allows (`Sharding`).
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from attrs import define, field

from corefit.system import memory
from corefit.system.ranks import Ranks
from corefit.types import Streamed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROOM = 0.5
"""Share of a device's free memory that may be filled by keeping weights and gradients; the rest is for activations."""
UPDATE = 3
"""What an optimizer step adds to a weight that trains, in sizes of it: its gradient and two moments."""
EXACT = 4
"""Bytes of a number of a gradient, which is float32."""


def shard(transformer: torch.nn.Module, device: torch.device, copies: int = 1) -> None:
    """Shard every parameter over the ranks (FSDP2). Each item of a ModuleList, a block, is gathered by itself.

    copies  how many groups of ranks hold all shards; with several (HSDP), a group gathers weights within itself
    """
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    mesh = _mesh(device.type, copies, dist.group.WORLD)
    lists = {name: m for name, m in transformer.named_modules() if isinstance(m, nn.ModuleList)}
    outer = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    for block in (block for blocks in outer for block in blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(transformer, mesh=mesh)


@functools.cache
def _mesh(kind: str, copies: int, every: Any) -> Any:
    """Return the mesh of the processes of the group `every`, the default one; groups within it are made once."""
    from torch.distributed.device_mesh import init_device_mesh

    world = every.size()
    shape, names = ((world,), ("shard",)) if copies == 1 else ((copies, world // copies), ("replicate", "shard"))
    return init_device_mesh(kind, shape, mesh_dim_names=names)


def is_sharded(transformer: torch.nn.Module) -> bool:
    """Return whether `shard` has been called on the network."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(transformer, FSDPModule)


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this rank's shards of DTensors, and other tensors themselves; the memory is shared with them."""
    return [local_part(t.detach()) for t in tensors]


def local_part(t: Any) -> Tensor:
    """Return this rank's shard of a DTensor, and another tensor itself."""
    from torch.distributed.tensor import DTensor

    return t.to_local() if isinstance(t, DTensor) else t


def local_rows(tensor: Any) -> slice:
    """Return which rows of a tensor this rank holds: all, or those that fully_shard gives it, cut as by torch.chunk."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return slice(None)
    axis = next(number for number, placement in enumerate(tensor.placements) if placement.is_shard())
    size = -(-tensor.shape[0] // tensor.device_mesh.size(axis))
    start = min(size * tensor.device_mesh.get_local_rank(axis), tensor.shape[0])
    return slice(start, start + len(tensor.to_local()))


def fill(transformer: torch.nn.Module, backbone: Streamed, device: torch.device) -> None:
    """Read this rank's shard of every weight from the files; an adapter, which has its values already, stays."""
    import torch

    transformer._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)  # pyright: ignore[reportPrivateUsage]
    with torch.no_grad(), backbone.stored() as stored:
        for name, tensor in transformer.state_dict().items():
            if not is_adapter(name):
                local_part(tensor).copy_(stored[plain_name(name)][local_rows(tensor)])


def plain_name(name: str) -> str:
    """Return a weight's name without what peft puts into it."""
    return name.replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    """Return whether a weight of this name belongs to a LoRA."""
    return ".lora_" in name


def reshard(transformer: torch.nn.Module) -> None:
    """Free all gathered weights of a sharded network; this rank's shards are what it has then."""
    for module in _sharded_modules(transformer):
        module.reshard()


def kept_bytes(transformer: torch.nn.Module, copies: int = 0) -> int:
    """Return the bytes that a network takes, beside its shards, while its weights stay gathered within a step.

    These are all weights, the gradient of those that train, and each of `copies` of them: the reference policy and
    moving copies. The network may be a blank one.
    """
    weights = sum(p.numel() * p.element_size() for p in transformer.parameters())
    trained = [p for p in transformer.parameters() if p.requires_grad]
    return weights + sum(p.numel() * (EXACT + copies * p.element_size()) for p in trained)


def keeps(gather: Literal["auto", "step", "term"], kept: float, free: float) -> bool:
    """Return whether weights stay gathered within a step, which takes `kept` bytes.

    free  bytes that the device has beside shards, gradients, optimizer and copies, for activations too
    """
    return gather == "step" or (gather == "auto" and kept <= ROOM * free)


@define(eq=False)
class Sharding:
    """When the weights of a network are gathered in training, and when its gradients are exchanged.

    transformer  the network; where it is not sharded, nothing here does anything
    kept         whether weights stay gathered, and gradients whole, until a step's end
    """

    transformer: torch.nn.Module
    kept: bool = False
    size: int = 0
    """Bytes that keeping them takes or would take."""
    _active: bool = False
    """Whether weights stay gathered now."""
    _whole: dict[int, Mapping[str, Tensor]] = field(factory=dict[int, "Mapping[str, Tensor]"])
    """Copies of the weights that train, gathered, by the id of the mapping that holds their shards."""

    @staticmethod
    def of(transformer: torch.nn.Module, ranks: Ranks, copies: int = 0) -> Sharding:
        """Decide for a network that is on the device already, by memory unless a key says so; all ranks decide alike.

        copies  how many copies of the weights that train are called in a step
        """
        if not is_sharded(transformer):
            return Sharding(transformer)
        trained = sum(t.nbytes for t in local(p for p in transformer.parameters() if p.requires_grad))
        free = free_memory(ranks.device) - UPDATE * trained
        size = kept_bytes(transformer, copies)
        kept = keeps(ranks.layout.gather, size, free)
        return Sharding(transformer, not ranks.any(not kept), size)

    @property
    def gather(self) -> str:
        """How long gathered weights are kept, as the key says it."""
        return "step" if self.kept else "term"

    def announce(self, stage: str, ranks: Ranks) -> None:
        """Say what was decided, where weights are sharded."""
        if is_sharded(self.transformer):
            size, chosen = memory.size(self.size), ", chosen by memory" if ranks.layout.gather == "auto" else ""
            how = f"stay gathered within a step, which takes {size}" if self.kept else "are gathered in each term"
            ranks.accelerator.print(f'stage {stage}: sharded weights {how} (gather = "{self.gather}"{chosen})')

    @contextmanager
    def step(self) -> Generator[None]:
        """Within, weights that were gathered stay so until `release`; afterwards only shards are held."""
        if not self.kept:
            yield
            return
        self._keep(True)
        try:
            yield
        finally:
            self._keep(False)
            self.release()

    def exchange(self, now: bool) -> None:
        """Let the next backward exchange all gradients since the last exchange, or none."""
        if self._active:
            self.transformer.set_requires_gradient_sync(now)  # pyright: ignore[reportCallIssue]

    def release(self) -> None:
        """Free what is gathered, before the weights change."""
        if self.kept:
            self._whole = {}
            reshard(self.transformer)

    def free(self) -> None:
        """Free what is gathered, whoever left it so."""
        if is_sharded(self.transformer):
            reshard(self.transformer)

    def gathered(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        """Return copies of the weights that train as whole tensors, with which the network can be called as it is.

        All its weights are gathered then. Return None where they do not stay so.
        """
        if not self._active:
            return None
        if id(tensors) not in self._whole:
            device = next(self.transformer.parameters()).device
            self._whole[id(tensors)] = {name: _gather(t, device) for name, t in tensors.items()}
        for module in _sharded_modules(self.transformer):
            module.unshard()
        return self._whole[id(tensors)]

    def _keep(self, active: bool) -> None:
        self._active = active
        network: Any = self.transformer
        network.set_reshard_after_forward(not active)
        network.set_reshard_after_backward(not active)
        network.set_requires_gradient_sync(True)
        if not active:  # torch's default for the outermost module, whose weights backward needs at once
            network.set_reshard_after_forward(False, recurse=False)


def free_memory(device: torch.device) -> float:
    """Return the bytes of a device that this process has not allocated: of a GPU, or its share of main memory."""
    import os

    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] - torch.cuda.memory_allocated(device)
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return psutil.virtual_memory().total / beside - psutil.Process().memory_info().rss


def _gather(tensor: Any, device: torch.device) -> Tensor:
    """Return the whole of a DTensor, whose shard may be in main memory, on the device of each rank."""
    from torch.distributed.tensor import Replicate

    brought = tensor.to(device, non_blocking=True)
    return brought.redistribute(placements=[Replicate()] * brought.device_mesh.ndim).to_local()


def _sharded_modules(transformer: torch.nn.Module) -> Iterator[Any]:
    from torch.distributed.fsdp import FSDPModule

    return (module for module in transformer.modules() if isinstance(module, FSDPModule))
