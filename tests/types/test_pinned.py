"""Memory that is locked for copies to a GPU; CUDA's runtime is a fake, which notes what it is asked."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from torch import nn

from corefit.train import weights
from corefit.types import pinned


class Runtime:
    """CUDA's runtime; it refuses to lock more than `limit` bytes."""

    def __init__(self, limit: int = 1 << 40) -> None:
        self.limit, self.locked = limit, dict[int, int]()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if size > self.limit:
            return 2
        assert address % pinned.PAGE == size % pinned.PAGE == 0, "a page of which another tensor has a part"
        self.locked[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    return made


WEIGHTS = {"a": torch.arange(70_000.0), "b": torch.ones(3, 5, dtype=torch.bfloat16), "none": torch.ones(0)}


def test_copies_take_no_more_than_they_need_and_are_locked_until_they_are_freed(runtime):
    """Tensor.pin_memory would take twice 2^18 bytes for the first of them."""
    copies = pinned.copies_on_host(WEIGHTS)
    needed = sum(t.nbytes for t in WEIGHTS.values())
    assert needed <= sum(runtime.locked.values()) < needed + 2 * pinned.PAGE
    assert all(torch.equal(copies[name], t) for name, t in WEIGHTS.items())
    assert {name: t.dtype for name, t in copies.items()} == {name: t.dtype for name, t in WEIGHTS.items()}
    copies["a"].zero_()
    assert WEIGHTS["a"].sum() > 0
    del copies["a"]
    gc.collect()
    assert runtime.locked, "the other copies lie in the same memory"
    copies.clear()
    gc.collect()
    assert not runtime.locked


def test_memory_that_cannot_be_locked_is_used_as_it_is_and_said_once(runtime):
    runtime.limit = 0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        first, second = (pinned.copies_on_host(WEIGHTS) for _ in range(2))
    assert all(torch.equal(each[name], t) for each in (first, second) for name, t in WEIGHTS.items())
    assert [str(each.message) for each in said if "could not be locked" in str(each.message)] == [
        "main memory could not be locked for copies to the GPU ; the run goes on, with slower copies"
    ]
    assert len(pinned.pinned(0)) == 0


def test_copies_of_weights_on_a_gpu_are_locked(runtime, monkeypatch):
    """Without a GPU, it is the weights that say that they are on one."""

    class OnGpu(nn.Parameter):
        device = torch.device("cuda")

        def detach(self):
            return self

    network = {"w": OnGpu(torch.ones(5000))}
    made = weights.copied(network, on_host=True)
    assert runtime.locked
    assert torch.equal(made["w"], torch.ones(5000))
    assert made["w"].data_ptr() in range(min(runtime.locked), min(runtime.locked) + pinned.PAGE)
