"""Which example is trained on when: a function of (seed, stage, step), never of rank or history."""

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
    """A stage's way through the data; a prompt's `group` rows follow each other.

    buckets  numbers of the examples of each bucket, none empty; a batch is of one bucket
    batch    rows a step over all ranks
    order    epochs: keyed permutations one after the other, each example of a bucket once before any comes again,
             and each bucket in every epoch as often as it has batches; independent: batch / group different prompts
             a step, as Flow-GRPO's DistributedKRepeatSampler draws them from (seed, step); its shuffle over ranks is
             left out, so that groups stay whole
    """

    buckets: Sequence[NDArray[np.int64]]
    batch: int
    group: int
    seed: int
    stage: str | int
    order: Order

    def at(self, step: int) -> list[int]:
        """Numbers of the examples of the global batch, [batch]."""
        chosen = self._drawn(step) if self.order == "independent" else self._walked(step)
        return [int(number) for number in chosen for _ in range(self.group)]

    def turns(self, step: int) -> list[float]:
        """Which caption of its example a row gets, [batch] in [0, 1); one for a group."""
        drawn = generator(self.seed, self.stage, "caption", step).random(self._prompts)
        return [float(turn) for turn in drawn for _ in range(self.group)]

    @property
    def _prompts(self) -> int:
        return self.batch // self.group

    @cached_property
    def _counts(self) -> tuple[int, ...]:
        return tuple(len(bucket) for bucket in self.buckets)

    def _drawn(self, step: int) -> Sequence[int]:
        import torch

        share = np.cumsum(self._counts) / sum(self._counts)
        at = generator(self.seed, self.stage, "bucket", step).random() if len(self.buckets) > 1 else 0.0
        bucket = self.buckets[int(np.searchsorted(share, at, side="right"))]
        shuffled = torch.randperm(len(bucket), generator=torch.Generator().manual_seed(self.seed + step))
        return [int(bucket[index]) for index in shuffled[: self._prompts]]

    def _walked(self, step: int) -> Sequence[Any]:
        number, turn = self._turn(step)
        bucket, count = self.buckets[number], self._counts[number]
        places = range(turn * self._prompts, (turn + 1) * self._prompts)
        key = (number,) if len(self.buckets) > 1 else ()
        return [bucket[_permutation(count, self.seed, self.stage, at // count, *key)[at % count]] for at in places]

    def _turn(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and how many batches of it came before."""
        if len(self.buckets) == 1:
            return 0, step
        epoch = step * self._prompts // sum(self._counts)
        while (before := self._before(epoch + 1)) <= step:
            epoch += 1
        turns = _turns(self._counts, self._prompts, self.seed, self.stage, epoch)
        return turns[step - before + len(turns)]

    def _before(self, epoch: int) -> int:
        """Batches of all epochs before `epoch`: what does not fill one is left to the next epoch."""
        return sum(epoch * count // self._prompts for count in self._counts)


@lru_cache(maxsize=4)
def _turns(counts: tuple[int, ...], prompts: int, seed: int, stage: str | int, epoch: int) -> Sequence[tuple[int, int]]:
    """The batches of an epoch in their order: (bucket, how many of it came before in all)."""
    turns = [
        (bucket, turn)
        for bucket, count in enumerate(counts)
        for turn in range(epoch * count // prompts, (epoch + 1) * count // prompts)
    ]
    shuffled = [turns[i] for i in generator(seed, stage, "buckets", epoch).permutation(len(turns))]
    # whatever their order, a bucket's own batches come one after the other
    waiting = {bucket: iter([t for t in turns if t[0] == bucket]) for bucket in range(len(counts))}
    return [next(waiting[bucket]) for bucket, _ in shuffled]


@lru_cache(maxsize=64)
def _permutation(n: int, seed: int, stage: str | int, epoch: int, *bucket: int) -> NDArray[np.int64]:
    return generator(seed, stage, "order", epoch, *bucket).permutation(n)


def check_batch(n: int, batch: int, group: int, world: int, order: Order) -> None:
    """ConfigError where n examples cannot fill batches of whole groups on `world` ranks."""
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
