"""What to propose where memory runs out: keys of a pipeline that would save some and are not set so already."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attrs import fields, has

from corefit.types import ROUNDING
from corefit.types.objective import weighted_objectives
from corefit.types.stage import Full, Lora, Stage

KEPT = "Checkpoints are whole, and the same command goes on from the newest"


def step_helps(stage: Stage, mode: Full | Lora, backbone: Any, world: int, *, sharded: bool) -> list[str]:
    """List the keys of a stage that would save memory in a step and are not set so already."""
    rows = min(stage.micro_batch or stage.rows, stage.rows // world)
    name = f"stage.{stage.name}"
    helps = [f"{name}.micro_batch = {rows // 2} (now {rows})"] if rows > 1 else []
    for each in weighted_objectives(stage.objective):
        path = f"{name}.objective{f'.of.{each.name}' if each.name else ''}"
        helps += [f"{path}.{key} = {value // 2} (now {value})" for key, value in _larger(each.value)]
    if getattr(backbone, "gradient_checkpointing", True) is False:
        helps.append("backbone.gradient_checkpointing = true")
    return [*helps, *weights_helps(mode, world, sharded=sharded)]


def weights_helps(mode: Full | Lora, world: int, *, sharded: bool) -> list[str]:
    """List the keys that would make weights, gradients and optimizer state smaller and are not set so already."""
    lora = ['backbone.train = { use = "lora" }'] if isinstance(mode, Full) else []
    more = [] if sharded else ["shard = true" if world > 1 else "shard = true on several devices"]
    return [*lora, *more]


def _larger(plugin: Any) -> Iterator[tuple[str, int]]:
    """Yield a plugin's keys, with a value above 1, that say how much a forward holds and change rounding alone."""
    for each in fields(type(plugin)) if has(type(plugin)) else ():
        value = getattr(plugin, each.name)
        if each.metadata.items() >= ROUNDING.items() and type(value) is int and value > 1:
            yield each.name, value
