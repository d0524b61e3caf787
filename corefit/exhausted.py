"""Memory that runs out: said with where it happened, how much was asked for, and which keys would help."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from attrs import fields, has

from corefit.errors import TrainingError
from corefit.objective import summands
from corefit.stage import Full, Lora, Stage
from corefit.types import ROUNDING

ASKED = re.compile(r"tried to allocate ([\d.]+ ?\w+)", re.IGNORECASE)
"""In the messages of both of torch's allocators: of CUDA's "2.50 GiB", of the CPU's "2684354560 bytes"."""
CPU = "DefaultCPUAllocator: can't allocate memory"

KEPT = "Checkpoints are whole, and the same command goes on from the newest"


@contextmanager
def told(where: str, helps: Sequence[str], kept: str = "") -> Generator[None]:
    """Turn memory that runs out inside into a TrainingError.

    where  what was computed, such as "stage soar, step 3, term 2"
    helps  keys that would take less memory
    kept   what is not lost
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_exhausted(error):
            raise
        asked = found[1] if (found := ASKED.search(str(error))) else ""
        sought = f"; {asked} more were asked for" if asked else ""
        would = (
            f"What would help: {', or '.join(helps)}"
            if helps
            else ("All keys that save memory are set: take a smaller [data] size, or a device with more memory")
        )
        raise TrainingError(f"{where}: out of memory{sought}. {would}{f'. {kept}' if kept else ''}") from error


def is_exhausted(error: BaseException) -> bool:
    """Whether main memory or a device's ran out."""
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or CPU in str(error)


def step_helps(stage: Stage, mode: Full | Lora, backbone: Any, world: int, *, sharded: bool) -> list[str]:
    """Keys of a stage that would take less memory in a step and are not set so already."""
    rows = min(stage.micro_batch or stage.rows, stage.rows // world)
    name = f"stage.{stage.name}"
    helps = [f"{name}.micro_batch = {rows // 2} (now {rows})"] if rows > 1 else []
    for each in summands(stage.objective):
        path = f"{name}.objective{f'.of.{each.name}' if each.name else ''}"
        helps += [f"{path}.{key} = {value // 2} (now {value})" for key, value in _larger(each.objective)]
    if getattr(backbone, "gradient_checkpointing", True) is False:
        helps.append("backbone.gradient_checkpointing = true")
    return [*helps, *weights_helps(mode, world, sharded=sharded)]


def weights_helps(mode: Full | Lora, world: int, *, sharded: bool) -> list[str]:
    """Keys that would make weights, gradients and the optimizer's state smaller and are not set so already."""
    lora = ['backbone.train = { use = "lora" }'] if isinstance(mode, Full) else []
    more = [] if sharded else ["shard = true" if world > 1 else "shard = true on several devices"]
    return [*lora, *more]


def _larger(plugin: Any) -> Iterator[tuple[str, int]]:
    """Keys above 1 of a plugin that change rounding alone: how many of something a forward holds."""
    for each in fields(type(plugin)) if has(type(plugin)) else ():
        value = getattr(plugin, each.name)
        if each.metadata.items() >= ROUNDING.items() and type(value) is int and value > 1:
            yield each.name, value
