"""The blocks of a network: which follow each other and are equal, and which of them computes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

from attrs import frozen

if TYPE_CHECKING:
    from torch import nn

Kind = tuple[Hashable, ...]
"""What equal blocks have in common: their class, and the weights' names, shapes and dtypes."""


@frozen
class Run:
    """Equal blocks that follow each other in a ModuleList.

    name   the list's name in its network
    first  the place of the first of them, and `count` their number
    """

    name: str
    first: int
    count: int


def runs(network: nn.Module) -> list[Run]:
    """Return the runs of equal blocks in a network's own ModuleLists."""
    from torch import nn

    found: list[Run] = []
    for name, each in network.named_children():
        first = 0
        for _, equal in groupby(map(_kind, each) if isinstance(each, nn.ModuleList) else ()):
            count = len(list(equal))
            found.append(Run(name, first, count))
            first += count
    return found


@contextmanager
def noted(network: nn.Module, note: Callable[[Hashable, float], None]) -> Generator[None]:
    """Within, call `note` each time that a block begins to compute, or to compute again for its gradient.

    It gets the kind of the block with whether it is the first of its run, and the most bytes of frozen weights that are
    on the device where these wait in main memory: those of the block and of one beside it. The first block fetches the
    last one's, or the last one the first's, where another forward follows.
    """
    named = dict(network.named_children())
    places: list[tuple[Any, Hashable]] = []
    for run in runs(network):
        for number, block in enumerate(list(named[run.name].children())[run.first : run.first + run.count]):
            places.append((block, (_kind(block), number == 0)))
    sizes = [_frozen_bytes(block) for block, _ in places]
    hooks: list[Any] = []
    for number, (block, place) in enumerate(places):
        fetched = sizes[number] + max(sizes[number - 1], sizes[(number + 1) % len(sizes)])

        def enter(*_: Any, place: Hashable = place, fetched: float = fetched) -> None:
            note(place, fetched)

        hooks.append(block.register_forward_pre_hook(enter))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _kind(block: nn.Module) -> Kind:
    return (type(block), *((name, t.shape, t.dtype, t.requires_grad) for name, t in block.named_parameters()))


def _frozen_bytes(block: Any) -> int:
    return sum(t.numel() * t.element_size() for t in block.parameters() if not t.requires_grad)
