"""The encoded captions of a cache: each caption of a partition is stored once, coded as in `lossless`."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import define, field

from corefit.data import lossless, mds

if TYPE_CHECKING:
    from torch import Tensor

    from corefit.data.mds import TensorSpec

FOLDER = "texts"
"""The folder of a partition that holds the shards of its captions."""
INDEX = "texts.json"
"""The index of all captions of a cache; caches that were written before have none, and captions in their rows."""


@define(eq=False)
class Writer:
    """Appends the captions of a partition to its shards; `open_writer` opens one.

    specs    dtype and shape of each tensor of a condition, by column
    numbers  caption -> its number in the partition
    """

    shards: mds.Writer
    specs: Mapping[str, TensorSpec]
    numbers: dict[str, int] = field(factory=dict[str, int])

    def number(self, caption: str, condition: Mapping[str, bytes]) -> int:
        """Return the number of a caption; its condition (column -> bytes) is written if the caption is new."""
        if caption not in self.numbers:
            self.shards.append(
                {name: lossless.code(row, *_layout(self.specs[name])) for name, row in condition.items()}
            )
            self.numbers[caption] = len(self.numbers)
        return self.numbers[caption]


@contextmanager
def open_writer(partition: Path, specs: Mapping[str, TensorSpec]) -> Generator[Writer]:
    """Write the captions of a new partition; `specs` has the columns of its conditions."""
    with mds.open_writer(partition / FOLDER, dict.fromkeys(specs, "bytes")) as shards:
        yield Writer(shards, specs)


def merge_indexes(folder: Path, partitions: Sequence[str]) -> None:
    """Write the index of the captions of those `partitions` of a cache that store them apart from their rows."""
    mds.merge_indexes(folder, [f"{name}/{FOLDER}" for name in partitions if (folder / name / FOLDER).exists()], INDEX)


@define(eq=False)
class Texts:
    """Random access to the encoded captions of a cache.

    starts  partition -> the number of captions in the partitions before it
    """

    shards: mds.Shards
    starts: Mapping[str, int]

    @staticmethod
    def open(folder: Path, remote: str | None, rebuildable: bool) -> Texts | None:
        """Open the captions of the cache in `folder`, or return None where they are in its rows; see `mds.Shards`."""
        if not (folder / INDEX).exists():
            return None
        shards, starts = mds.Shards(folder, remote, rebuildable, INDEX), dict[str, int]()
        for start in shards.starts[:-1]:
            starts.setdefault(shards.partition(start), start)
        return Texts(shards, starts)

    def __len__(self) -> int:
        return len(self.shards)

    def read(self, partition: str, number: int) -> mds.Row:
        """Return the coded tensors of a caption by column, given its number in its partition."""
        return self.shards[self.starts[partition] + number]


def restore(rows: Sequence[bytes], spec: TensorSpec) -> Tensor:
    """Return the tensor [B, ...] whose coded rows are given; ValueError if they are not of this dtype and shape."""
    import torch

    out = torch.empty((len(rows), *spec.shape), dtype=getattr(torch, spec.dtype))
    for row, target in zip(rows, out.reshape(len(rows), prod(spec.shape)).view(torch.uint8).numpy(), strict=True):
        lossless.restore(row, target, *_layout(spec))
    return out


def _layout(spec: TensorSpec) -> tuple[tuple[int, ...], int]:
    """Return a row's shape, and the bytes of one of its values."""
    import torch

    return spec.shape, getattr(torch, spec.dtype).itemsize
