"""The parts of the command: what each measures, for how long at most, and what it is compared with."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from benchmarks.gpu.rows import GIB, Row

if TYPE_CHECKING:
    import torch

    from benchmarks.gpu.measuring import Operations
    from benchmarks.gpu.models import Subject

POINTS, PATH_STEPS, GUIDANCE = 6, 40, 4.5
ROLLOUT, GROUP, NOISE = 10, 8, 0.7
ROWS = 4
LIMIT = 24 * GIB
"""Bytes of memory that FLUX.1-dev may take."""
SIDE, QUICK_SIDE = 8192, 256
"""Of the matrices that are multiplied."""


@frozen(kw_only=True)
class Part:
    """One part: a process of its own, and a row of the table.

    says     what is measured
    seconds  how long it may take, start and loading included
    against  the part whose step does the same as published, or in a plain loop
    step     makes the step: (subject) -> step
    needs    operations of a step: (operations of a sample, samples) -> number
    keys     keys of the backbone
    """

    says: str
    seconds: int
    model: str = "sd3"
    rows: int = ROWS
    against: str = ""
    step: Callable[[Subject], Callable[[], object]]
    needs: Callable[[Operations], int]
    keys: Mapping[str, Any] = {}
    limit: int | None = None


def _sft(subject: Subject) -> Callable[[], object]:
    from corefit_sft import Sft

    return _trained(subject, Sft())


def _plain_sft(subject: Subject) -> Callable[[], object]:
    from benchmarks import plain

    network, batch = subject.plain(), subject.batch()
    shift = subject.backbone.shift(subject.shape)
    return lambda: plain.sft_step(network, batch.clean, batch.cond.tensors, shift)


def _soar(chunk: int | None, guidance: float = GUIDANCE) -> Callable[[Subject], Callable[[], object]]:
    def step(subject: Subject) -> Callable[[], object]:
        from corefit_soar.objective import Soar

        return _trained(subject, Soar(points=POINTS, guidance=guidance, steps=PATH_STEPS, chunk=chunk))

    return step


def _published_soar(subject: Subject) -> Callable[[], object]:
    from benchmarks import plain

    network, batch = subject.plain(), subject.batch()
    shift = subject.backbone.shift(subject.shape)
    settings = plain.Correction(points=POINTS, steps=PATH_STEPS, guidance=GUIDANCE, shift=shift)
    subject.backbone.transformer.enable_gradient_checkpointing()
    return lambda: plain.published_soar(network, batch.clean, batch.cond.tensors, subject.null.tensors, settings)


def _grpo(guidance: float = GUIDANCE, steps: int = ROLLOUT) -> Callable[[Subject], Callable[[], object]]:
    def step(subject: Subject) -> Callable[[], object]:
        from corefit.samplers import FlowSde
        from corefit_flow_grpo import FlowGrpo

        objective = FlowGrpo(group=subject.rows, steps=steps, guidance=guidance)
        return _trained(subject, objective, FlowSde(noise=NOISE))

    return step


def _published_grpo(subject: Subject) -> Callable[[], object]:
    from benchmarks.grpo_variants import Plain, Settings

    settings = Settings(group=subject.rows, steps=ROLLOUT, guidance=GUIDANCE, noise=NOISE)
    network, batch = subject.plain(), subject.batch(subject.rows)
    return Plain.of(network, settings, batch, subject.backbone, (0,)).published


def _trained(subject: Subject, objective: Any, sampler: Any = None) -> Callable[[], object]:
    """A step of corefit's trainer."""
    loop, batch = subject.loop(objective, sampler), subject.batch(objective.group_size)
    return lambda: loop.take_step(batch)


def _one(each: Operations) -> int:
    return each.both


def _points(halves: int) -> Callable[[Operations], int]:
    """The step's own forward and backward, that of each point, and the empty prompt's forward (`halves` - 1 of it)."""
    return lambda each: (1 + POINTS) * each.both + (halves - 1) * each.forward


def _policy(halves: int, steps: int = ROLLOUT) -> Callable[[Operations], int]:
    """Each sampling step's forwards, and for all but the last one a forward and backward."""
    return lambda each: halves * (steps * each.forward + (steps - 1) * each.both)


COMPILED = {"compile": True}
ON_24 = {"frozen": "int8", "gradient_checkpointing": True}
FLUX_STEPS = 6
PARTS: Mapping[str, Part] = {
    "sft": Part(says="SD3.5-medium, SFT", seconds=70, against="sft, plain", step=_sft, needs=_one),
    "sft, plain": Part(says="the same in a bare torch loop", seconds=70, step=_plain_sft, needs=_one),
    "soar": Part(says="SOAR, 1 point a chunk", seconds=90, against="soar, published", step=_soar(1), needs=_points(2)),
    "soar 3": Part(
        says="SOAR, 3 points a chunk", seconds=90, against="soar, published", step=_soar(3), needs=_points(2)
    ),
    "soar, found": Part(
        says="SOAR, as many points a chunk as memory has room for",
        seconds=85,
        against="soar, published",
        step=_soar(None),
        needs=_points(2),
    ),
    "soar, compiled": Part(
        says="SOAR, 1 point a chunk, compiled",
        seconds=140,
        against="soar, published",
        step=_soar(1),
        needs=_points(2),
        keys=COMPILED,
    ),
    "soar 3, compiled": Part(
        says="SOAR, 3 points a chunk, compiled",
        seconds=140,
        against="soar, published",
        step=_soar(3),
        needs=_points(2),
        keys=COMPILED,
    ),
    "soar, published": Part(
        says="the published SOAR step, written plainly", seconds=100, step=_published_soar, needs=_points(2)
    ),
    "grpo": Part(says="Flow-GRPO", seconds=120, rows=GROUP, against="grpo, published", step=_grpo(), needs=_policy(2)),
    "grpo, published": Part(
        says="the published GRPO step, written plainly", seconds=120, rows=GROUP, step=_published_grpo, needs=_policy(2)
    ),
    "flux, soar": Part(
        says="FLUX.1-dev, SOAR LoRA on int8, limited to 24 GiB",
        seconds=110,
        model="flux",
        rows=1,
        step=_soar(1, guidance=3.5),
        needs=_points(2),
        keys=ON_24,
        limit=LIMIT,
    ),
    "flux, grpo": Part(
        says="FLUX.1-dev, GRPO LoRA on int8, limited to 24 GiB",
        seconds=110,
        model="flux",
        rows=4,
        step=_grpo(guidance=3.5, steps=FLUX_STEPS),
        needs=_policy(1, FLUX_STEPS),
        keys=ON_24,
        limit=LIMIT,
    ),
}


def measured(name: str, *, quick: bool, ends: float) -> Row:
    """Measure one part in this process, until the clock says `ends`."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "product":
        return product(device, quick)
    part = PARTS[name]
    if part.limit and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, part.limit / total), device)
    with tempfile.TemporaryDirectory() as folder:
        return _step(name, part, Path(folder), device, quick, ends)


def _step(name: str, part: Part, folder: Path, device: torch.device, quick: bool, ends: float) -> Row:
    from benchmarks.gpu import measuring, models

    keys = {} if quick and device.type == "cpu" else part.keys
    subject = getattr(models, part.model)(folder, device, part.rows, quick=quick, **keys)
    needs = part.rows * part.needs(measuring.Operations.of(subject))
    step = part.step(subject)
    found = measuring.timed(step, device, ends, warm=3 if keys.get("compile") else 1)
    seconds = found.seconds
    return Row(
        part=name,
        name=name,
        status="ok",
        seconds=seconds.median,
        low=seconds.low,
        high=seconds.high,
        rate=part.rows / seconds.median,
        flops=needs / seconds.median,
        peak=found.peak,
        against=part.against,
        note=f"{part.says}; {type(subject.mode).__name__.lower()}, {part.rows} samples a step",
    )


def product(device: torch.device, quick: bool) -> Row:
    """The matrix product that utilization is measured against."""
    from benchmarks.gpu import measuring

    side = QUICK_SIDE if quick else SIDE
    rate = measuring.product(device, side)
    return Row(part="product", name="product", status="ok", flops=rate, note=f"a matrix product of {side} squared")


def names() -> Iterator[str]:
    """The parts in the order in which they run; that which everything is compared with comes first."""
    yield "tests"
    yield "product"
    yield from PARTS


def most_seconds(name: str) -> float:
    """How long a part may take."""
    return {"tests": 210.0, "product": 45.0}.get(name) or PARTS[name].seconds


def deadline(seconds: float) -> float:
    """When a part stops taking steps, so that it ends in `seconds` from now."""
    return time.monotonic() + 0.7 * seconds
