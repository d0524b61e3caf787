"""Memory of this process: kept between steps on a CPU, its peak, the bytes of live tensors, and what to do without."""

from __future__ import annotations

import atexit
import contextlib
import gc
import re
import sys
import weakref
from collections.abc import Callable, Generator, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define, field

from corefit.errors import OutOfMemory

if TYPE_CHECKING:
    import torch


ASKED = re.compile(r"tried to allocate ([\d.]+ ?\w+)", re.IGNORECASE)
"""Finds the size in messages of both of torch's allocators: "2.50 GiB" of CUDA's, "2684354560 bytes" of the CPU's."""
SAID = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)
"""What errors say that are of no class of their own."""


def keep_freed() -> None:
    """Let this process keep main memory that it frees (glibc; elsewhere nothing is done).

    Each step allocates activations of the same sizes. If their memory went back to the system in between, every page
    would fault anew: on the digits example that costs 40 % of the speed of training on a CPU.
    """
    import ctypes

    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 1 << 30)
        mallopt(m_top_pad, 1 << 28)


@contextlib.contextmanager
def uncollected(library: str) -> Generator[None]:
    """Import a large library inside; what that makes is not searched for garbage, neither now nor later.

    The collector would look at half a million objects of which nearly all stay, again and again: a fifth of the time to
    the first step. Nothing is done where the library is there already, for garbage of a run would be kept too.
    """
    if library in sys.modules or not gc.isenabled():
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # or nanobind, in triton, says at the end that all of this leaks


def free_networks() -> None:
    """Free networks that nothing uses any more. Hooks refer back to them, so without this they wait for a collection.

    What a GPU's allocator keeps of them is freed as well.
    """
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far. The peak of main memory can be reset on Linux alone; elsewhere it stays."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Return the peak in bytes: of memory allocated on the GPU, or else resident in main memory."""
    import resource

    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class TooMany(Exception):
    """There are more live bytes than are worth being counted."""


@define(eq=False)
class LiveBytes:
    """Bytes of the live tensors that were allocated inside `track_live_bytes`, now and at most."""

    now: int = 0
    peak: int = 0
    peaks: dict[Hashable, int] = field(factory=dict[Hashable, int])
    """The most bytes in each `place`."""
    place: Hashable = None
    """Set by the caller: what is computed now, such as a kind of block."""
    limit: float = float("inf")
    """Counting ends with TooMany once there are more bytes than these."""
    kept: int = 0
    """Not set here: the caller may store `now` of a moment in it, such as the end of the forward."""
    _alive: set[int] = field(factory=set[int])

    def count(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor that an operation returned, unless it is counted already."""
        storage = tensor.untyped_storage()
        place, size = storage._cdata, storage.nbytes()  # pyright: ignore[reportPrivateUsage]
        if place not in self._alive:
            self._alive.add(place)
            self.now += size
            self.peak = max(self.peak, self.now)
            if self.now > self.limit:
                raise TooMany
            self.peaks[self.place] = max(self.peaks.get(self.place, 0), self.now)
            weakref.finalize(storage, self._freed, place, size)

    def _freed(self, place: int, size: int) -> None:
        self._alive.discard(place)
        self.now -= size


@contextlib.contextmanager
def track_live_bytes() -> Generator[LiveBytes]:
    """Track the tensors that are allocated inside, on any device and fake ones too; kernels' own memory is not seen."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    held = LiveBytes()

    class Track(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            before = {_place(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            result = func(*args, **(kwargs or {}))
            for t in tree_leaves(result):
                if isinstance(t, torch.Tensor) and _place(t) not in before:
                    held.count(t)
            return result

    with Track():
        yield held


def _place(t: torch.Tensor) -> int:
    return t.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


@contextlib.contextmanager
def explain_exhaustion(
    where: str, helps: Sequence[str] | Callable[[], Sequence[str]], kept: str = ""
) -> Generator[None]:
    """Turn an out-of-memory error inside into an OutOfMemory that says what would help.

    where  what was computed, such as "stage soar, step 3, term 2"
    helps  keys that would take less memory, or what finds them
    kept   a sentence that says what is not lost
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_exhausted(error):
            raise
        asked = size[1] if (size := ASKED.search(str(error))) else ""
        sought = f"; {asked} more were asked for" if asked else ""
        found = helps() if callable(helps) else helps
        would = (
            f"What would help: {', or '.join(found)}"
            if found
            else ("All keys that save memory are set: take a smaller [data] size, or a device with more memory")
        )
        raise OutOfMemory(f"{where}: out of memory{sought}. {would}{f'. {kept}' if kept else ''}") from error


def room(device: torch.device) -> float | None:
    """Return the bytes that this process may still allocate on a GPU; None on a CPU."""
    import torch

    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    limit = torch.cuda.get_per_process_memory_fraction(device) * total
    return min(float(free + reserved), limit) - allocated


def taken(device: torch.device, call: Callable[[], None]) -> int:
    """Return by how many bytes of live tensors `call` goes beyond those before it; a GPU's peak is reset for it."""
    import torch

    if device.type != "cuda":
        with track_live_bytes() as live:
            call()
        return live.peak
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def give_back(device: torch.device) -> None:
    """Free what nobody refers to any more, and give a GPU's cached memory back, so that it can be cut anew."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_exhausted(error: BaseException) -> bool:
    """Return whether the error means that main memory or a device's ran out."""
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(each in str(error) for each in SAID)


def total() -> int:
    """Return the bytes of memory that the device of this process has, whoever uses them: a GPU, or main memory."""
    import psutil
    import torch

    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else psutil.virtual_memory().total


def described(device: torch.device) -> str:
    """Return the name of a device and the memory that this process may take of it, such as "NVIDIA H200, 139.8 GiB"."""
    import psutil
    import torch

    if device.type != "cuda":
        return f"{device.type}, {size(psutil.virtual_memory().total)}"
    limit = torch.cuda.get_per_process_memory_fraction(device) * torch.cuda.mem_get_info(device)[1]
    return f"{torch.cuda.get_device_name(device)}, {size(int(limit))}"


def size(count: int) -> str:
    """Write a number of bytes in MiB or GiB; a dash for 0."""
    if not count:
        return "-"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
