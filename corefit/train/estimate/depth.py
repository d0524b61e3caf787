"""Networks with fewer blocks in place of many equal ones, so that fake tensors need not go through all of them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from corefit.train.blocks import Run, runs

if TYPE_CHECKING:
    from torch import nn

LEAST = 2
"""Blocks that stay of a run of equal ones: a first one, and one that has a block before it."""
Places = Mapping[Hashable, int]
"""The most bytes while a kind of block computes. Each is linear in the number of blocks, which their maximum is not."""


def told(networks: Sequence[nn.Module], measure: Callable[[], Places | None]) -> Places | None:
    """Return what `measure` returns for networks of equal blocks, told by networks with fewer.

    Of each run of equal blocks LEAST stay, and one more tells what each of the others takes. The networks are as before
    afterwards.
    """
    found = [runs(network) for network in networks]
    long = [run for run in found[0] if run.count > LEAST + 1]
    if not long or any(each != found[0] for each in found):
        return measure()
    with _shortened(networks, dict.fromkeys(long, LEAST)):
        few = measure()
    total = dict(few or {})
    for run in long:
        with _shortened(networks, {**dict.fromkeys(long, LEAST), run: LEAST + 1}):
            more = measure()
        if few is None or more is None:
            return None
        for place, count in few.items():
            total[place] += (run.count - LEAST) * (more[place] - count)
    return total


@contextmanager
def _shortened(networks: Sequence[nn.Module], kept: dict[Run, int]) -> Generator[None]:
    """Within, only so many blocks of each of these runs are in the networks."""
    with ExitStack() as stack:
        for network in networks:
            for name in dict.fromkeys(run.name for run in kept):
                stack.enter_context(_replaced(network, name, {run for run in kept if run.name == name}, kept))
        yield


@contextmanager
def _replaced(network: nn.Module, name: str, cut: set[Run], kept: dict[Run, int]) -> Generator[None]:
    from torch import nn

    whole: Any = getattr(network, name)
    dropped = {place for run in cut for place in range(run.first + kept[run], run.first + run.count)}
    setattr(network, name, nn.ModuleList(block for place, block in enumerate(whole) if place not in dropped))
    try:
        yield
    finally:
        setattr(network, name, whole)
