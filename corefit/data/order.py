"""Sample batches: which examples a step trains on depends on (seed, stage, step) alone, never on rank or history."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from attrs import frozen

from corefit.errors import ConfigError
from corefit.rng import generator

if TYPE_CHECKING:
    from numpy.typing import NDArray

Order = Literal["epochs", "independent"]


@frozen(kw_only=True, eq=False, slots=False)
class BatchSampler:
    """Chooses the examples of each step of a stage; the `group` rows of one prompt are consecutive.

    buckets  indices of the examples in each bucket, none empty; all examples of a batch are from one bucket
    batch    rows in a step, over all ranks
    order    epochs: a keyed permutation for each epoch, so each example of a bucket is seen once before any is seen
             again, and each epoch has as many batches of a bucket as it fills; independent: batch / group different
             prompts for each step, drawn from (seed, step) as Flow-GRPO's DistributedKRepeatSampler draws them, but
             without its shuffle over ranks, so that groups stay whole
    """

    buckets: Sequence[NDArray[np.int64]]
    batch: int
    group: int
    seed: int
    stage: str | int
    order: Order

    def indices(self, step: int) -> list[int]:
        """Return the indices of the examples in the global batch of `step`, [batch]."""
        chosen = self._draw_independent(step) if self.order == "independent" else self._draw_epochs(step)
        return [int(index) for index in chosen for _ in range(self.group)]

    def caption_choices(self, step: int) -> list[float]:
        """Return for each row which of its example's captions to use, [batch] in [0, 1); equal within a group."""
        drawn = generator(self.seed, self.stage, "caption", step).random(self._prompts)
        return [float(choice) for choice in drawn for _ in range(self.group)]

    @property
    def _prompts(self) -> int:
        return self.batch // self.group

    @cached_property
    def _counts(self) -> tuple[int, ...]:
        return tuple(len(bucket) for bucket in self.buckets)

    def _draw_independent(self, step: int) -> Sequence[int]:
        import torch

        share = np.cumsum(self._counts) / sum(self._counts)
        uniform = generator(self.seed, self.stage, "bucket", step).random() if len(self.buckets) > 1 else 0.0
        bucket = self.buckets[int(np.searchsorted(share, uniform, side="right"))]
        shuffled = torch.randperm(len(bucket), generator=torch.Generator().manual_seed(self.seed + step))
        return [int(bucket[index]) for index in shuffled[: self._prompts]]

    def _draw_epochs(self, step: int) -> Sequence[Any]:
        number, nth = self._bucket_and_batch(step)
        bucket, count = self.buckets[number], self._counts[number]
        key = (number,) if len(self.buckets) > 1 else ()
        positions = range(nth * self._prompts, (nth + 1) * self._prompts)  # in the bucket's permutations, concatenated
        return [bucket[_permutation(count, self.seed, self.stage, p // count, *key)[p % count]] for p in positions]

    def _bucket_and_batch(self, step: int) -> tuple[int, int]:
        """Return the bucket of a step, and how many earlier batches were from that bucket."""
        if len(self.buckets) == 1:
            return 0, step
        epoch = step * self._prompts // sum(self._counts)
        while (before := self._batches_before(epoch + 1)) <= step:
            epoch += 1
        schedule = _epoch_schedule(self._counts, self._prompts, self.seed, self.stage, epoch)
        return schedule[step - before + len(schedule)]

    def _batches_before(self, epoch: int) -> int:
        """Count the batches of all epochs before `epoch`; examples that fill no batch are carried to the next epoch."""
        return sum(epoch * count // self._prompts for count in self._counts)


@lru_cache(maxsize=4)
def _epoch_schedule(
    counts: tuple[int, ...], prompts: int, seed: int, stage: str | int, epoch: int
) -> Sequence[tuple[int, int]]:
    """Return the batches of an epoch in order, each as (bucket, number of earlier batches from that bucket)."""
    batches = [
        (bucket, nth)
        for bucket, count in enumerate(counts)
        for nth in range(epoch * count // prompts, (epoch + 1) * count // prompts)
    ]
    shuffled = [batches[i] for i in generator(seed, stage, "buckets", epoch).permutation(len(batches))]
    # buckets are shuffled; within a bucket, batches stay in order, for each continues the bucket's permutation
    remaining = {bucket: iter([b for b in batches if b[0] == bucket]) for bucket in range(len(counts))}
    return [next(remaining[bucket]) for bucket, _ in shuffled]


@lru_cache(maxsize=64)
def _permutation(n: int, seed: int, stage: str | int, epoch: int, *bucket: int) -> NDArray[np.int64]:
    return generator(seed, stage, "order", epoch, *bucket).permutation(n)


def check_batch(n: int, batch: int, group: int, world: int, order: Order) -> None:
    """Raise ConfigError if n examples cannot fill batches of whole groups on `world` ranks."""
    if batch % group or (batch // group) % world:
        nearest = max(round(batch / (group * world)), 1) * group * world
        raise ConfigError(
            f"batch = {batch} cannot be split into whole groups of {group} on {world} ranks; it must be a multiple of "
            f"{group} x {world} = {group * world}, such as {nearest}"
        )
    if order == "independent" and batch // group > n:
        raise ConfigError(
            f'order = "independent" draws batch / group = {batch // group} different prompts a step and the data '
            f'have {n}; lower batch or raise group, or set order = "epochs" under [data]'
        )
