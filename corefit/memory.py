"""Memory of this process: keeping it between steps on a CPU, and its peak."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def keep_freed() -> None:
    """Keep main memory that is freed, for the next step (glibc; elsewhere nothing).

    A step frees and asks for the same activations again. Given back to the system in between, every page faults
    anew: on the digits example that costs 40 % of the speed of training on a CPU.
    """
    import ctypes

    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 1 << 30)
        mallopt(m_top_pad, 1 << 28)


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far. Where main memory's cannot be reset (not Linux), it goes on."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Bytes: allocated on the GPU, or resident in main memory."""
    import resource

    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
