"""What takes less memory: keys of a pipeline that are not set so already, in the order of what they cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from attrs import fields, frozen, has

from corefit.types import ROUNDING
from corefit.types.objective import moving_copies, weighted_objectives
from corefit.types.optimizer import AdamW
from corefit.types.stage import Full, Lora, Stage

if TYPE_CHECKING:
    from corefit.pipeline.pipeline import Pipeline
    from corefit.train.estimate.device import Device
    from corefit.train.estimate.phases import Estimate

KEPT = "Checkpoints are whole, and the same command goes on from the newest"
ALONE = (
    "With shard or context_parallel a process that ran out cannot take the step again by itself, since the others wait "
    "for it: set micro_batch, as above. "
)
FILLED = 0.8
"""Share of a device that sharded weights may take; the rest is for activations."""
FEWER = {None: "fp8", "bf16": "fp8", "fp8": "nf4", "int8": "nf4"}
"""The format of a frozen base that takes fewer bytes than another; int8 takes as many as fp8."""
LORA = '{ use = "lora" }'
COSTS = {
    "micro_batch": "no result; small forwards are slower",
    "batch": "no result",
    "chunk": "up to 10 % of the time",
    "gradient_checkpointing": "a third more time",
    "tile": "tiles of the VAE overlap, and differ a little from the whole",
    "text_encoders": "prompts are encoded slowly, once",
    "copies": "copies pass to the device in each step",
    "optimizer": "its state is rounded to 8 bits",
    "frozen": "the base is rounded; `corefit check --measure` says how much is lost",
    "gather": "weights are gathered in each forward and backward",
    "offload": "blocks pass to the device in each forward and backward",
    "shard": "weights are gathered from other devices",
    "train": "an adapter is trained in place of all weights",
}
"""What a key costs, by its last name, from the least to the most."""
TO_HOST = ("offload", "copies", "text_encoders")
"""Last names of keys that move something to main memory, which takes nothing off where a device has no other."""


def last_name(key: str) -> str:
    """Return the name by which COSTS has a key: "optimizer" for "stage.soar.optimizer.use"."""
    return key.removesuffix(".use").rpartition(".")[2]


def place(key: str) -> int:
    """Return the place of a key in the order of what it costs."""
    return list(COSTS).index(last_name(key)) if last_name(key) in COSTS else 0


@frozen
class Remedy:
    """A key and a value that take less memory.

    key    such as "stage.soar.micro_batch"
    value  as TOML
    now    the value that it has, where that is worth saying
    where  a remark
    """

    key: str
    value: str
    now: int | None = None
    where: str = ""

    @property
    def setting(self) -> str:
        """The remedy as `--set` takes it."""
        return f"{self.key}={self.value}"

    @property
    def cost(self) -> str:
        """What it costs, in words."""
        return COSTS.get(last_name(self.key), "")

    def __str__(self) -> str:
        now = "" if self.now is None else f" (now {self.now})"
        return f"{self.key} = {self.value}{now}{self.where}"


def ladder(
    stage: Stage, mode: Full | Lora, backbone: Any, world: int, *, sharded: bool, gather: str = "term", gpu: bool = True
) -> Iterator[Remedy]:
    """Yield what would take less memory of a device in a stage and is not set yet, in the order of what it costs.

    A micro-batch that is not set is none of it: the trainer finds one that fits.
    """
    name = f"stage.{stage.name}"
    rows = min(stage.micro_batch or 1, max(1, stage.rows // world))
    if rows > 1:
        yield Remedy(f"{name}.micro_batch", str(rows // 2), rows)
    for each in weighted_objectives(stage.objective):
        path = f"{name}.objective{f'.of.{each.name}' if each.name else ''}"
        yield from (Remedy(f"{path}.{key}", str(value // 2), value) for key, value in _larger(each.value))
    if getattr(backbone, "gradient_checkpointing", True) is False and getattr(backbone, "offload", "none") == "none":
        yield Remedy("backbone.gradient_checkpointing", "true")
    yield from weight_remedies(stage, mode, backbone, world, sharded=sharded, gather=gather, gpu=gpu)


def weight_remedies(
    stage: Stage | None,
    mode: Full | Lora,
    backbone: Any,
    world: int,
    *,
    sharded: bool,
    gather: str = "term",
    gpu: bool = True,
) -> Iterator[Remedy]:
    """Yield what makes weights, gradients, optimizer state and copies smaller, in the order of what it costs."""
    found = _weight_remedies(stage, mode, backbone, world, sharded, gather)
    yield from (each for each in found if gpu or last_name(each.key) not in TO_HOST)


def _weight_remedies(
    stage: Stage | None, mode: Full | Lora, backbone: Any, world: int, sharded: bool, gather: str
) -> Iterator[Remedy]:
    yield from _state_remedies(stage, mode) if stage is not None else ()
    lora = isinstance(mode, Lora)
    if lora and (now := getattr(backbone, "frozen", "nf4")) in FEWER:
        yield Remedy("backbone.frozen", f'"{FEWER[now]}"')
    if sharded and world > 1 and gather != "term":
        yield Remedy("gather", '"term"')
    if lora and getattr(backbone, "offload", "blocks") == "none" and not (sharded and world > 1):
        yield Remedy("backbone.offload", '"blocks"')
    shard = Remedy("shard", "true", where="" if world > 1 else " on several devices")
    can_shard = not sharded and getattr(backbone, "offload", "none") == "none"
    if can_shard and world > 1:  # the devices are there; an adapter would be another training
        yield shard
    if not lora:
        own = stage is not None and stage.train is not None
        yield Remedy(f"stage.{stage.name}.train" if stage is not None and own else "backbone.train", LORA)
    if can_shard and world == 1:
        yield shard


def _state_remedies(stage: Stage, mode: Full | Lora) -> Iterator[Remedy]:
    """Yield what makes copies and the optimizer's state smaller."""
    name = f"stage.{stage.name}"
    copied = stage.ema is not None or "reference" in stage.objective.uses or bool(moving_copies(stage.objective))
    if copied and stage.copies != "cpu":
        yield Remedy(f"{name}.copies", '"cpu"')
    if type(stage.optimizer) is AdamW and isinstance(mode, Full) and find_spec("bitsandbytes"):
        yield Remedy(f"{name}.optimizer.use", '"adamw8bit"')


def step_helps(
    stage: Stage, mode: Full | Lora, backbone: Any, world: int, *, sharded: bool, gather: str = "term", gpu: bool = True
) -> list[str]:
    """List the keys of a stage that would save memory in a step and are not set so already.

    gather  how long sharded weights stay gathered: "step" or "term"
    """
    return [str(each) for each in ladder(stage, mode, backbone, world, sharded=sharded, gather=gather, gpu=gpu)]


def weights_helps(mode: Full | Lora, world: int, *, sharded: bool, backbone: Any = None, gpu: bool = True) -> list[str]:
    """List the keys that would make weights, gradients and optimizer state smaller and are not set so already."""
    return [str(each) for each in weight_remedies(None, mode, backbone, world, sharded=sharded, gpu=gpu)]


def room_helps(pipeline: Pipeline, stage: Stage, e: Estimate, device: Device, world: int) -> Iterator[str]:
    """Yield what would help where weights and all that training keeps of them do not fit."""
    mode = pipeline.mode(stage)
    if isinstance(mode, Lora) and not device.half(pipeline.precision):
        yield 'precision = "bf16"'
    for each in weight_remedies(stage, mode, pipeline.backbone, world, sharded=True, gather="term", gpu=device.gpu):
        yield str(each)
    if stage.ema is not None and stage.copies == "cpu":
        yield f"{stage.name}.ema left out"
    if e.rewards and device.gpu:
        yield 'device = "cpu" for a reward'
    each = e.decoder + e.rewards  # which are not sharded
    whole, room = (e.certain - e.exchanged - each) * (world if pipeline.shard else 1), device.memory * FILLED - each
    if room > 0:
        yield f"shard = true on {math.ceil(whole / room)} devices or more"


def pipeline_ladder(pipeline: Pipeline, stage: Stage, world: int, *, gpu: bool = True) -> Iterator[Remedy]:
    """Yield what would take less memory in any phase of a stage and is not set yet, in the order of what it costs."""
    if pipeline.eval and pipeline.eval.batch > 1:
        yield Remedy("eval.batch", str(pipeline.eval.batch // 2), pipeline.eval.batch)
    if getattr(pipeline.backbone, "tile", 0) is None and pipeline.data.encoded is None:  # it was encoded without
        yield Remedy("backbone.tile", "512")
    if gpu and getattr(pipeline.backbone, "text_encoders", "cpu") == "device":
        yield Remedy("backbone.text_encoders", '"cpu"')
    sharded = pipeline.shard or world == 1
    gather = pipeline.gather if pipeline.shard and world > 1 else "term"
    yield from ladder(stage, pipeline.mode(stage), pipeline.backbone, world, sharded=sharded, gather=gather, gpu=gpu)


def _larger(plugin: Any) -> Iterator[tuple[str, int]]:
    """Yield a plugin's keys, with a value above 1, that say how much a forward holds and change rounding alone."""
    for each in fields(type(plugin)) if has(type(plugin)) else ():
        value = getattr(plugin, each.name)
        if each.metadata.items() >= ROUNDING.items() and type(value) is int and value > 1:
            yield each.name, value
