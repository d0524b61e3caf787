"""Locked main memory: copies between it and a GPU do not hold up the host."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PAGE = 4096
"""Bytes of a page of memory: as many are locked at once."""
PORTABLE = 1
"""cudaHostRegisterPortable: memory that copies to every device may read."""
ALIGNED = 256
"""Tensors begin at multiples of so many bytes, as allocations on a GPU do."""


def aligned(size: int) -> int:
    """Return the bytes that a tensor of `size` bytes takes among others."""
    return -(-size // ALIGNED) * ALIGNED


def piece(memory: Tensor, start: int, like: Tensor) -> Tensor:
    """Return the part of `memory`, uint8 [N], from `start` on that holds a tensor of the dtype and shape of another."""
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)


def pinned(size: int) -> Tensor:
    """Return locked main memory, uint8 [size].

    Tensor.pin_memory would take the next power of two. Where the system refuses to lock memory, a warning says so, and
    the memory is an ordinary one.
    """
    import torch

    locked = -(-size // PAGE) * PAGE
    whole = torch.empty(locked + PAGE, dtype=torch.uint8)
    start = -whole.data_ptr() % PAGE  # pages that other memory lies in are not locked: they could be so just once
    if locked:
        _lock(whole, whole.data_ptr() + start, locked)
    return whole[start : start + size]


def copies_on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies in one piece of locked main memory; of a DTensor, this rank's shard is copied."""
    memory = pinned(sum(aligned(_local(t).nbytes) for t in tensors.values()))
    copies, start = dict[str, "Tensor"](), 0
    for name, tensor in tensors.items():
        mine = _local(tensor)
        held = piece(memory, start, mine).copy_(mine)
        start += aligned(mine.nbytes)
        copies[name] = held if mine is tensor else _with_local(tensor, held)
    return copies


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _with_local(tensor: Any, local: Tensor) -> Tensor:
    """Return a DTensor in main memory that is cut as another one is, and has `local` for this rank's shard."""
    made = tensor.to("cpu", copy=True)
    made._local_tensor = local
    return made


def _lock(memory: Tensor, address: int, size: int) -> None:
    """Lock `size` bytes of `memory` from `address` on until it is freed."""
    import torch

    cudart: Any = torch.cuda.cudart()
    if not int(cudart.cudaHostRegister(address, size, PORTABLE)):
        weakref.finalize(memory.untyped_storage(), cudart.cudaHostUnregister, address).atexit = False
        return
    with contextlib.suppress(RuntimeError):  # CUDA keeps the error for the next kernel, whose launch would raise it
        torch.zeros(1, device="cuda")
    warnings.warn(
        "main memory could not be locked for copies to the GPU ; the run goes on, with slower copies",
        stacklevel=2,
    )
