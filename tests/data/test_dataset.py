"""Batches: their rows belong together, ranks get disjoint ones, and the prefetch thread ends."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from corefit.data import lossless
from corefit.data.cache import prepare
from corefit.data.dataset import Dataset, pack
from corefit.data.loader import batches
from corefit.data.mds import TensorSpec
from corefit.data.order import BatchSampler, check_batch
from corefit.data.settings import Data
from corefit.data.texts import restore
from corefit.errors import ConfigError, DataError
from corefit.types import Batch, Condition, Example

GOLDEN = Path(__file__).parents[1] / "golden/k_repeat.json"
N = 10


class Toy:
    """A backbone whose latents identify the example: all pixels of picture n are n."""

    def encoding_key(self) -> dict[str, str]:
        return {"toy": "1"}

    def encode_text(self, prompts: Sequence[str]) -> Condition:
        return Condition({"text": torch.tensor([float(p or -1) for p in prompts])[:, None].bfloat16()})

    def null(self, n: int) -> Condition:
        return self.encode_text([""] * n)

    def encode(self, media: Tensor) -> Tensor:
        return (media[:, :1, :2, :2] * 255).round()

    def latent_shape(self, size: Sequence[int]) -> tuple[int, ...]:
        return (1, 2, 2)

    def release(self) -> None: ...


@attrs.frozen
class Numbers:
    n: int
    media: bool = True

    def examples(self) -> Iterator[Example]:
        import numpy as np

        for i in range(self.n):
            yield Example(str(i), np.full((4, 4, 3), i, np.uint8) if self.media else None, {"i": i})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    data = Data(Numbers(N), size=(4, 4))
    return Dataset.open(prepare(data, Toy(), tmp_path_factory.mktemp("cache"), media=True))  # type: ignore[arg-type]


def sampler(dataset: Dataset, **changes: Any) -> BatchSampler:
    given: dict[str, Any] = {"batch": 8, "group": 2, "seed": 0, "stage": "soar", "order": "epochs"}
    return BatchSampler(buckets=list(dataset.buckets.values()), **{**given, **changes})


def stream(
    dataset: Dataset, start: int = 0, rank: int = 0, world: int = 1, device: str = "cpu", **changes: Any
) -> Iterator[Batch]:
    return batches(dataset, sampler(dataset, **changes), start=start, rank=rank, world=world, device=device)


def take(source: Iterator[Batch], n: int) -> list[Batch]:
    taken = [next(source) for _ in range(n)]
    source.close()  # type: ignore[attr-defined]
    return taken


# batches


def test_rows_media_prompts_and_meta_belong_together(dataset: Dataset) -> None:
    for step, batch in enumerate(take(stream(dataset), 5)):
        wanted = sampler(dataset).indices(step)
        assert list(batch.rows) == list(range(8 * step, 8 * step + 8))
        assert batch.clean[:, 0, 0, 0].tolist() == wanted
        assert batch.cond.tensors["text"][:, 0].tolist() == wanted
        assert [int(p) for p in batch.prompts] == [m["i"] for m in batch.meta] == wanted
        assert batch.clean.dtype == torch.float32
        assert batch.cond.tensors["text"].dtype == torch.bfloat16
        part, cut = batch[2:5], wanted[2:5]
        assert (len(part), part.rows) == (3, range(8 * step + 2, 8 * step + 5))
        assert part.clean[:, 0, 0, 0].tolist() == part.cond.tensors["text"][:, 0].tolist() == cut
        assert [int(p) for p in part.prompts] == [m["i"] for m in part.meta] == cut


@pytest.mark.parametrize("order", ["epochs", "independent"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_see_the_global_batch(dataset: Dataset, world: int, order: str) -> None:
    one = take(stream(dataset, order=order), 6)
    ranks = [take(stream(dataset, order=order, rank=rank, world=world), 6) for rank in range(world)]
    for step, whole in enumerate(one):
        parts = [rank[step] for rank in ranks]
        assert [r for part in parts for r in part.rows] == list(whole.rows)
        assert [p for part in parts for p in part.prompts] == list(whole.prompts)
        assert torch.cat([part.clean for part in parts]).equal(whole.clean)
        assert all(part.prompts[i] == part.prompts[i + 1] for part in parts for i in range(0, len(part), 2))
    rows = [r for rank in ranks for batch in rank for r in batch.rows]
    assert len(set(rows)) == len(rows) == 48


def test_a_resumed_stream_continues_where_it_stopped(dataset: Dataset) -> None:
    whole, resumed = take(stream(dataset), 6), take(stream(dataset, start=4), 2)
    for before, after in zip(whole[4:], resumed, strict=True):
        assert before.rows == after.rows
        assert before.clean.equal(after.clean)


def test_prompts_without_media_have_no_latents(tmp_path: Path) -> None:
    folder = prepare(Data(Numbers(3, media=False), size=(4, 4)), Toy(), tmp_path, media=False)  # type: ignore[arg-type]
    (batch,) = take(stream(Dataset.open(folder), batch=12), 1)
    assert batch.x0 is None
    assert batch.shape == (1, 2, 2)
    assert len(batch.cond) == 12


@pytest.mark.parametrize(
    ("batch", "group", "world", "order", "message"),
    [
        (10, 4, 1, "epochs", "batch = 10 .* groups of 4 on 1 ranks.* multiple of 4 x 1 = 4, such as 8"),
        (8, 4, 4, "epochs", "multiple of 4 x 4 = 16, such as 16"),
        (44, 2, 2, "independent", "22 different prompts a step and the data have 10"),
    ],
)
def test_a_batch_size_that_cannot_be_split_is_refused_at_once(
    dataset: Dataset, batch: int, group: int, world: int, order: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        stream(dataset, batch=batch, group=group, world=world, order=order)
    with pytest.raises(ConfigError, match=message):
        check_batch(N, batch, group, world, order)


# the prefetch thread


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("corefit-data")]


def test_one_thread_prefetches_and_ends_with_the_iterator(dataset: Dataset) -> None:
    source = stream(dataset)
    assert readers() == []
    next(source)
    next(source)
    assert len(readers()) == 1
    source.close()  # type: ignore[attr-defined]
    assert readers() == []


def test_an_error_in_the_thread_is_raised_at_its_step(dataset: Dataset, monkeypatch: Any) -> None:
    read = Dataset.batch

    def broken(self: Dataset, indices: Sequence[int], rows: Sequence[int], *rest: Any) -> Batch:
        if rows[0] >= 16:
            raise DataError("shard.00000.mds is damaged")
        return read(self, indices, rows, *rest)

    monkeypatch.setattr(Dataset, "batch", broken)
    source = stream(dataset)
    assert [next(source).rows[0] for _ in range(2)] == [0, 8]
    with pytest.raises(DataError, match="is damaged"):
        next(source)
    assert readers() == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int64", "bool", "float8_e4m3fn"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_tensors_of_any_dtype_are_restored_from_bytes(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = (torch.arange(4 * max(1, torch.Size(shape).numel())) % 2).reshape(4, *shape).to(getattr(torch, dtype))
    coded = [lossless.code(row, shape, tensor.itemsize) for row in pack(tensor)]
    back = restore(coded, TensorSpec(dtype, shape))
    assert back.dtype == tensor.dtype
    assert back.view(torch.uint8).equal(tensor.view(torch.uint8)) if shape else back.float().equal(tensor.float())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_arrive_on_the_gpu(dataset: Dataset) -> None:
    (batch,) = take(stream(dataset, device="cuda"), 1)
    assert batch.clean.is_cuda
    assert batch.cond.tensors["text"].is_cuda


def test_nothing_heavy_is_imported_to_describe_data() -> None:
    code = (
        "import sys, corefit.data.sources, corefit.data.mds, corefit.data.dataset, corefit.data.cache;"
        "print([m for m in ('torch', 'streaming', 'PIL', 'safetensors') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
