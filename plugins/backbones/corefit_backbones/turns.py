"""Networks that take turns on a device: those that encode prompts and media, where all together would take too much."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import define, field

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SHARE = 0.5
"""Share of a device's memory up to which networks stay there together; the rest is for what they compute."""


def bytes_of(network: nn.Module) -> int:
    """Return the bytes of a network's weights and buffers."""
    return sum(t.nbytes for t in (*network.parameters(), *network.buffers()))


def most(sizes: Mapping[str, int], memory: float) -> int:
    """Return the most bytes that networks of these sizes take at once on a device of `memory` bytes."""
    together, limit = sum(sizes.values()), int(SHARE * memory)
    return together if together <= limit else max(*sizes.values(), limit)


@define(eq=False)
class Turns:
    """Brings a network to the device when it is used, and sends the others away if there would be too many.

    limit    bytes that networks may take together; one that takes more is alone
    present  networks that are on the device, by name: their weights, and where they are to return, what they were in
             main memory, so that nothing is copied back
    """

    device: torch.device
    limit: float
    present: dict[str, list[tuple[Tensor, Tensor | None]]] = field(factory=dict[str, Any])
    _sizes: dict[str, int] = field(init=False, factory=dict[str, int])

    @staticmethod
    def on(device: torch.device) -> Turns:
        """Make the turns of a device of this machine."""
        import torch

        return Turns(device, SHARE * torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else float("inf"))

    def add(self, name: str, network: Any) -> None:
        """Let a network on the CPU come to the device before each forward."""
        self._sizes[name] = bytes_of(network)
        network.register_forward_pre_hook(lambda *_: self.use(name, network))

    def use(self, name: str, network: nn.Module) -> None:
        """Bring a network to the device now."""
        if name in self.present:
            return
        self._sizes[name] = bytes_of(network)
        if self._sizes[name] + sum(self._sizes[each] for each in self.present) > self.limit:
            self.clear()
        returns = sum(self._sizes.values()) > self.limit
        tensors = [*network.parameters(), *network.buffers()]
        self.present[name] = [(tensor, tensor.data if returns else None) for tensor in tensors]
        for tensor in tensors:
            tensor.data = tensor.data.to(self.device)

    def clear(self) -> None:
        """Send all networks away."""
        for tensors in self.present.values():
            for tensor, kept in tensors:
                tensor.data = tensor.data.cpu() if kept is None else kept
        self.present.clear()
