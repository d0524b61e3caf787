"""Peak memory of a step: bytes that autograd keeps for backward, and what the process grows by."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from attrs import define, field

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")


@define(eq=False, slots=False)
class _Kept:
    """What autograd holds in a saved tensor's place; dies when the graph drops it."""

    tensor: Tensor


@define(eq=False)
class Activations:
    """Bytes of the storages that live graphs keep, each counted once, weights and buffers left out.

    Non-reentrant gradient checkpointing hides what it recomputes in backward: at most one block's.
    """

    weights: frozenset[int]
    """Addresses of storages that do not count."""
    kept: dict[int, int] = field(factory=dict[int, int])
    """Address of a storage -> saved tensors in it."""
    now: int = 0
    peak: int = 0

    @staticmethod
    def of(model: torch.nn.Module) -> Activations:
        tensors = (*model.parameters(), *model.buffers())
        return Activations(frozenset(t.untyped_storage().data_ptr() for t in tensors))

    @contextlib.contextmanager
    def watch(self) -> Iterator[Activations]:
        """Count what is saved inside; `peak` starts anew."""
        import torch

        self.peak = self.now
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield self

    def _pack(self, tensor: Tensor) -> Tensor | _Kept:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self.weights or not size:
            return tensor
        if address not in self.kept:
            self.now += size
            self.peak = max(self.peak, self.now)
        self.kept[address] = self.kept.get(address, 0) + 1
        kept = _Kept(tensor)
        weakref.finalize(kept, self._drop, address, size)
        return kept

    def _drop(self, address: int, size: int) -> None:
        self.kept[address] -= 1
        if not self.kept[address]:
            del self.kept[address]
            self.now -= size


def _unpack(kept: Tensor | _Kept) -> Tensor:
    return kept.tensor if isinstance(kept, _Kept) else kept


def alone(call: Callable[..., T], *args: object) -> T:
    """`call` in a fork of this process, so that its memory is nobody else's; arguments are pickled."""
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(call, *args).result()


def peak_rss(run: Callable[[], None]) -> int | None:
    """Bytes by which resident memory grows at most during `run`; None where the system does not say."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        run()
        return _status("VmHWM") - before
    return None


def _status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
