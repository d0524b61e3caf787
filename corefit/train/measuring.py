"""How many rows a GPU has room for, measured before the first step with backwards of one row and of two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from corefit.errors import OutOfMemory
from corefit.system import memory
from corefit.train import weights
from corefit.train.sharding import Sharding
from corefit.train.state import State
from corefit.types import Backbone, Batch

if TYPE_CHECKING:
    from torch import Tensor

USABLE = 0.9
"""Share of the room that is filled; the rest is for what an objective keeps besides, and for gaps between tensors."""
Shape = Sequence[int]


def rows_that_fit(
    backbone: Backbone, state: State, sharding: Sharding, batch: Batch, shapes: Sequence[Shape]
) -> int | None:
    """Return how many rows of the largest of `shapes` a graph may have, on all ranks alike; at least 1.

    Return None on a CPU: what is free there says little, and main memory that runs out is seldom an error. Call it on
    all ranks. It leaves no gradients and draws nothing. In a larger shape, a row is taken to need more in proportion.
    """
    ranks = state.ranks
    if memory.room(ranks.device) is None:
        return None
    largest = max(map(math.prod, shapes)) / math.prod(batch.shape)
    try:
        most = _measured(backbone, state, sharding, batch) / largest
    except OutOfMemory:
        if ranks.forwards_together:  # not even one row fits; the others wait in an exchange
            raise
        most = 1.0
    for p in state.trainable.values():
        p.grad = None
    memory.give_back(ranks.device)
    return max(1, int(min(ranks.all_gather_object(most))))


def _measured(backbone: Backbone, state: State, sharding: Sharding, batch: Batch) -> float:
    """Return how many rows fit beside the weights, a gradient and the optimizer's state."""
    device = state.ranks.device

    def run(rows: int) -> None:
        with memory.explain_exhaustion("one row and two", []), _not_exchanged(state):
            state.ranks.accelerator.backward(_loss(backbone, batch, rows))

    sharding.exchange(False)
    run(1)  # gradients, workspaces and compiled kernels are there from now on
    one = memory.taken(device, lambda: run(1))
    most = 1.0
    if _may_try_two(state, one):
        row = max(1, memory.taken(device, lambda: run(2)) - one)
        absent = sum(t.nbytes for t in weights.local(p for p in state.trainable.values() if p.grad is None))
        room = (memory.room(device) or 0.0) * USABLE - state.optimizer.missing_bytes() - absent - (one - row)
        most = room / row
    sharding.exchange(True)
    run(1)  # whole gradients of sharded weights, if they were kept, are freed by it
    return most


def _may_try_two(state: State, one: int) -> bool:
    """Return, on all ranks alike, whether two rows can be tried, where one row takes `one` bytes.

    Where a forward needs several ranks, one that runs out of memory would leave the others waiting, so two rows are
    tried only if twice the bytes of one are free on all of them; two take less than that.
    """
    ranks = state.ranks
    return not ranks.forwards_together or not ranks.any((memory.room(ranks.device) or 0.0) * USABLE < 2 * one)


def _not_exchanged(state: State) -> AbstractContextManager[None]:
    return nullcontext() if state.ranks.sharded else state.ranks.accelerator.no_sync(state.transformer)


def _loss(backbone: Backbone, batch: Batch, rows: int) -> Tensor:
    import torch

    cond = batch.cond[:1].repeat(rows)
    device = next(iter(cond.tensors.values())).device
    x, sigma = torch.zeros((rows, *batch.shape), device=device), torch.full((rows,), 0.5, device=device)
    return (backbone.velocity(x, sigma, cond) ** 2).mean()
