"""Batches of a dataset, read ahead of the step that takes them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import TYPE_CHECKING

import attrs

from corefit.data.dataset import Dataset
from corefit.data.order import BatchSampler, check_batch
from corefit.types import Batch, Condition

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def batches(
    dataset: Dataset, walk: BatchSampler, *, start: int, rank: int, world: int, device: torch.device | str
) -> Generator[Batch, None, None]:
    """This rank's batches from step `start` on, endlessly; rows of step s are numbered from s * batch.

    A rank gets a contiguous slice of whole groups. The next batch is read in a thread, which ends when the
    iterator is closed; what went wrong there is raised here. ConfigError as `check_batch`.
    """
    check_batch(len(dataset), walk.batch, walk.group, world, walk.order)
    share, pinned = walk.batch // world, str(device).startswith("cuda")
    mine = slice(rank * share, (rank + 1) * share)

    def load(step: int) -> Batch:
        rows = range(step * walk.batch, (step + 1) * walk.batch)
        loaded = dataset.batch(walk.at(step)[mine], rows[mine], walk.turns(step)[mine])
        return _each(loaded, lambda t: t.pin_memory()) if pinned else loaded

    return _ahead(load, start, device)


def _ahead(load: Callable[[int], Batch], start: int, device: torch.device | str) -> Generator[Batch, None, None]:
    with ThreadPoolExecutor(1, thread_name_prefix="corefit-data") as pool:
        coming = pool.submit(load, start)
        for step in count(start + 1):
            batch = coming.result()
            coming = pool.submit(load, step)
            yield _each(batch, lambda t: t.to(device, non_blocking=True))


def _each(batch: Batch, f: Callable[[Tensor], Tensor]) -> Batch:
    cond = Condition({name: f(t) for name, t in batch.cond.tensors.items()})
    return attrs.evolve(batch, x0=None if batch.x0 is None else f(batch.x0), cond=cond)
