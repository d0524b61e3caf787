"""Blocks in main memory: the frozen weights of a block are on the device while it runs, and no longer.

diffusers' own group offloading is not used, because it cannot train. It moves the weights of a LoRA away with the
others. After gradient checkpointing has recomputed a block it leaves the block on the device, so that at the end of
backward all blocks are there. And it fetches the next block of the forward where backward needs the one before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from attrs import define, field, frozen

from corefit.types.pinned import aligned, piece, pinned

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def is_kept(name: str) -> bool:
    """Return whether a weight of a block stays on the device: one of a LoRA, which trains."""
    return ".lora_" in name


def apply(networks: Sequence[nn.Module], device: torch.device) -> None:
    """Put networks on `device`, except for the frozen weights of their blocks, which stay in main memory.

    A block is an item of a ModuleList of the network. Its weights are copied to the device before its forward, while
    the block before it computes, and dropped after it; so those of two blocks are there at most. In the backward pass,
    which must recompute each block (gradient checkpointing), they are kept until the block's gradient is computed.
    """
    import torch

    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    swaps = _Swaps(device, stream)
    for each in networks:
        blocks = [_Block.of(module, locked=stream is not None) for module in blocks_of(each)]
        for block in blocks:
            block.empty()
        each.to(device)
        for block in blocks:
            block.leave()
        for number in range(len(blocks)):
            swaps.attach(blocks, number)


def resident_bytes(networks: Sequence[nn.Module]) -> int:
    """Return the most bytes of weights that are on the device at once, of networks to which `apply` is to be applied.

    These are all weights outside of blocks, those of LoRAs, and twice the largest block.
    """
    weights = [[t for _, _, t in _frozen(block)] for each in networks for block in blocks_of(each)]
    everything = sum(t.nbytes for each in networks for t in (*each.parameters(), *each.buffers()))
    largest = max((sum(aligned(t.nbytes) for t in block) for block in weights), default=0)
    return everything - sum(t.nbytes for block in weights for t in block) + 2 * largest


def waiting(network: nn.Module) -> list[str]:
    """Return the names of the weights of a network that wait in main memory after `apply`."""
    members = {id(tensor) for block in blocks_of(network) for _, _, tensor in _frozen(block)}
    named = (*network.named_parameters(), *network.named_buffers())
    return [name for name, tensor in named if id(tensor) in members]


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network in the order in which they run: the items of its own ModuleLists.

    Lists further inside, such as that of the layers of Chroma's guidance, are not among them: they are small.
    """
    from torch import nn

    return [block for each in network.children() if isinstance(each, nn.ModuleList) for block in each]


@frozen(eq=False)
class _Slot:
    """A place of a weight in its module, and in the memory of its block."""

    owner: dict[str, Any]
    name: str
    waiting: Tensor
    """The weight in main memory, which is in its place while the block does not run."""
    start: int

    def piece(self, memory: Tensor) -> Tensor:
        """Return the part of `memory`, bytes [N], that is this weight's, in its dtype and shape."""
        return piece(memory, self.start, self.waiting)

    def fill(self, memory: Tensor) -> None:
        """Put this weight as it is in `memory` in the place of the one that waits."""
        import torch

        here, is_parameter = self.piece(memory), isinstance(self.waiting, torch.nn.Parameter)
        self.owner[self.name] = torch.nn.Parameter(here, requires_grad=False) if is_parameter else here


@define(eq=False)
class _Block:
    """A block whose weights are one piece of main memory, so that a single copy brings them to the device."""

    module: Any
    memory: Tensor
    slots: Sequence[_Slot]

    @staticmethod
    def of(module: nn.Module, *, locked: bool) -> _Block:
        """Move the frozen weights of a block into one piece of main memory, locked or not."""
        import torch

        slots, size = list[_Slot](), 0
        for owner, name, tensor in _frozen(module):
            slots.append(_Slot(owner, name, tensor, size))
            size += aligned(tensor.nbytes)
        block = _Block(module, pinned(size) if locked else torch.empty(size, dtype=torch.uint8), slots)
        for slot in slots:
            slot.waiting.data = slot.piece(block.memory).copy_(slot.waiting.detach())
        return block

    def enter(self, memory: Tensor) -> None:
        """Put the weights in `memory` in the place of those that wait."""
        for slot in self.slots:
            slot.fill(memory)

    def empty(self) -> None:
        """Leave the places of the weights empty, so that what moves the module moves all but them."""
        for slot in self.slots:
            slot.owner[slot.name] = None

    def leave(self) -> None:
        """Put the weights that wait back in their places."""
        for slot in self.slots:
            slot.owner[slot.name] = slot.waiting


def _frozen(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Yield the dictionary, the name in it and the tensor of each frozen weight and buffer of a block."""
    for prefix, each in module.named_modules():
        for owner in (vars(each)["_parameters"], vars(each)["_buffers"]):
            for name, tensor in owner.items():
                if tensor is not None and not is_kept(f"{prefix}.{name}"):
                    yield owner, name, tensor


@define(eq=False)
class _Swaps:
    """Brings the weights of blocks to the device, one block ahead, and drops them.

    ahead   the block that is fetched, or being fetched, and was not yet asked for, with its memory on the device
    """

    device: torch.device
    stream: Any
    ahead: tuple[_Block, Tensor, Any] | None = field(default=None)

    def attach(self, blocks: Sequence[_Block], number: int) -> None:
        """Let the forward of a block fetch its weights, and those of the block that will probably follow."""
        import torch

        block, before, after = blocks[number], blocks[max(0, number - 1)], blocks[(number + 1) % len(blocks)]

        def enter(*_: Any) -> None:
            block.enter(self._taken(block))
            if _in_backward():
                self._fetch(before)
            elif block is not blocks[-1] or not torch.is_grad_enabled():
                self._fetch(after)
            else:  # backward begins with it
                self._fetch(block)

        def leave(*_: Any) -> None:
            block.leave()

        compiled = block.module._compiled_call_impl is not None
        before_it, after_it = (torch.compiler.disable(each) if compiled else each for each in (enter, leave))
        block.module.register_forward_pre_hook(before_it)
        # always: recomputation ends some blocks by an exception
        block.module.register_forward_hook(after_it, always_call=True)

    def _taken(self, block: _Block) -> Tensor:
        """Return the weights of a block on the device, whether or not they were fetched ahead."""
        import torch

        if self.ahead is None or self.ahead[0] is not block:
            self.ahead = None
            self._fetch(block)
        assert self.ahead is not None
        (_, memory, event), self.ahead = self.ahead, None
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        return memory

    def _fetch(self, block: _Block) -> None:
        """Begin to copy the weights of a block to the device.

        On a GPU that is done on a stream of its own, whose memory nothing else is allocated from. The copy waits for
        what the device was told to compute before it: so memory of the block that has just ended can be taken for it
        at once, and no more than that of two blocks is ever taken, however far the host runs ahead.
        """
        import torch

        if self.stream is None:
            self.ahead = (block, block.memory.to(self.device, copy=True), None)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            memory = block.memory.to(self.device, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.ahead = (block, memory, event)


def _in_backward() -> bool:
    """Return whether this is called from a backward pass, which recomputes the blocks from the last to the first."""
    import torch

    return torch._C._current_graph_task_id() != -1  # pyright: ignore[reportPrivateUsage]
