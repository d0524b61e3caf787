"""Seconds of a step on a device, the rate of a matrix product, and the operations that a network's calls need."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen

from benchmarks.timing import Spread
from corefit.system import memory

if TYPE_CHECKING:
    from benchmarks.gpu.models import Subject

MOST = 8
"""Steps that are timed at most."""


@frozen
class Timed:
    """Seconds of a step, and the most bytes of the device's memory meanwhile."""

    seconds: Spread
    peak: int


def wait(device: torch.device) -> None:
    """Wait until the device has computed everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(step: Callable[[], object], device: torch.device, until: float, *, warm: int) -> Timed:
    """Take `warm` steps, then time others until the clock says `until`: at least 2, at most MOST."""
    for _ in range(warm):
        step()
    gc.collect()
    wait(device)
    memory.reset_peak(device)
    found = list[float]()
    while len(found) < 2 or (len(found) < MOST and time.monotonic() < until):
        began = time.perf_counter()
        step()
        wait(device)
        found.append(time.perf_counter() - began)
    return Timed(Spread.of(found), memory.peak(device))


def product(device: torch.device, side: int, repeats: int = 10) -> float:
    """Operations a second of a square matrix product: in bfloat16 on a GPU, in float32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    found = list[float]()
    for _ in range(repeats + 3):
        began = time.perf_counter()
        _ = a @ b
        wait(device)
        found.append(time.perf_counter() - began)
    return 2 * side**3 / statistics.median(found[3:])


@frozen
class Operations:
    """Floating-point operations that the network needs for one sample, without and with a backward after it."""

    forward: int
    both: int

    @staticmethod
    def of(subject: Subject) -> Operations:
        """Count them on the meta device, which computes nothing: products of matrices and attention, nothing else."""
        from corefit.train import weights

        blank = _blank(subject)
        blank.load_blank(torch.float32)
        weights.make_trainable(blank, subject.mode)
        meta = torch.device("meta")
        x, sigma, cond = torch.empty(1, *subject.shape, device=meta), torch.empty(1, device=meta), subject.null.to(meta)
        with torch.no_grad():
            forward = _counted(lambda: blank.velocity(x, sigma, cond))
        return Operations(forward, _counted(lambda: blank.velocity(x, sigma, cond).sum().backward()))


def _blank(subject: Subject) -> Any:
    """The same model as it is computed without fewer bits, offloading, compilation and recomputing."""
    backbone = subject.backbone
    return type(backbone)(backbone.path, max_sequence_length=backbone.max_sequence_length)


def _counted(run: Callable[[], object]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
