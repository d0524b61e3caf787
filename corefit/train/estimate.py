"""What a stage needs of a device's memory, from the network's config alone: nothing is read, nothing is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from attrs import evolve, frozen

from corefit.data import buckets
from corefit.errors import ConfigError
from corefit.pipeline.pipeline import Pipeline
from corefit.system import cuda, memory
from corefit.system.memory import size
from corefit.system.ranks import is_half
from corefit.train import fake, weights
from corefit.types import Sized
from corefit.types.objective import weighted_objectives
from corefit.types.stage import Full, Stage

if TYPE_CHECKING:
    from rich.table import Table

MASTER = 4
"""Bytes of a number that trains, and of its gradient and moments: all are float32."""
FILLED = 0.8
"""Share of a device that sharded weights may take; the rest is for activations."""


@frozen
class Device:
    """What a process of a run has: bytes of memory, and whether it is a GPU's."""

    name: str
    memory: float
    gpu: bool
    planned: bool = False
    """Not here: of a GPU that is, only it knows whether it has bfloat16; a planned one has."""

    @staticmethod
    def here() -> Device:
        """This machine's."""
        import psutil

        if cuda.may_be_there():
            import torch

            if torch.cuda.is_available():
                return Device(torch.cuda.get_device_name(), float(torch.cuda.mem_get_info()[1]), gpu=True)
        return Device("main memory", float(psutil.virtual_memory().total), gpu=False)

    @staticmethod
    def of(memory: float) -> Device:
        """A GPU that this machine need not have."""
        return Device("the GPU planned", memory, gpu=True, planned=True)

    def half(self, precision: str) -> bool:
        """Whether a pipeline's `precision` is bfloat16 on it."""
        return is_half(precision) or (self.planned and precision == "auto")


@frozen(kw_only=True)
class Estimate:
    """Of one stage, for one process.

    parameters, trainable          numbers
    weights, gradients, optimizer  bytes
    exchanged                      bytes of the gradients once more, as DDP hands them to other processes
    copies                         bytes of the average and the reference policy
    gathered                       bytes of the largest weight, of which shards are made whole while they are saved
    activations                    bytes that a step holds at most besides, None where that is not known
    """

    stage: str
    parameters: int
    trainable: int
    weights: float
    gradients: float
    optimizer: float
    exchanged: float
    copies: float
    gathered: float
    activations: int | None

    @property
    def read(self) -> float:
        """Bytes once the weights are read, which is as much as reading them takes."""
        return self.weights

    @property
    def saved(self) -> float:
        """Bytes while the last checkpoint and the model are saved, when there are no gradients."""
        return self.weights + self.optimizer + self.copies + self.gathered

    @property
    def certain(self) -> float:
        """Bytes that are there from the first step to the last."""
        return self.weights + self.gradients + self.optimizer + self.exchanged + self.copies

    @property
    def total(self) -> float:
        """With activations, where they are known."""
        return self.certain + (self.activations or 0)


def estimates(pipeline: Pipeline, device: Device, world: int = 1, *, graphs: bool = True) -> list[Estimate]:
    """Of every stage; none for a backbone that is not Sized.

    world   processes; they share what is sharded, and each step's rows
    graphs  whether activations are looked at too, which takes seconds
    """
    if not isinstance(pipeline.backbone, Sized):
        return []
    return [_estimate(pipeline, stage, device, world, graphs) for stage in pipeline.stage]


def refuse(pipeline: Pipeline, found: Sequence[Estimate], device: Device, world: int = 1) -> None:
    """ConfigError where a stage cannot fit, with what would help. Activations do not count: they are estimated."""
    for e, stage in zip(found, pipeline.stage, strict=False):
        needed = max(e.certain, e.saved)
        if needed > device.memory:
            parts = {
                "weights": e.weights,
                "gradients": e.gradients,
                "optimizer": e.optimizer,
                "gradients being exchanged": e.exchanged,
                "copies": e.copies,
                "the largest weight while it is saved": e.gathered if e.saved > e.certain else 0.0,
            }
            named = ", ".join(f"{name} {size(int(part))}" for name, part in parts.items() if part)
            helps = ", or ".join(_helps(pipeline, stage, e, device, world))
            raise ConfigError(
                f"stage.{stage.name}: {named} are {size(int(needed))} for each process, and {device.name} has "
                f"{size(int(device.memory))}; what would help: {helps}"
            )


def show(found: Sequence[Estimate], device: Device) -> None:
    """Print a table, and a line for each stage that its activations may make too large."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not found:
        console.print("memory: not known; the backbone does not say what it needs (corefit.types.Sized)")
        return
    console.print()
    console.print(_table(found, device))
    for e in found:
        if e.total > device.memory:
            console.print(
                f"\n{e.stage}: with its activations it may not fit; a smaller micro_batch would help, or "
                "gradient_checkpointing = true under [backbone]",
                soft_wrap=True,
            )


def _table(found: Sequence[Estimate], device: Device) -> Table:
    """A column a stage."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = {
        "parameters": [_count(e.parameters) for e in found],
        "that train": [_count(e.trainable) for e in found],
        "weights": [size(int(e.weights)) for e in found],
        "gradients": [size(int(e.gradients)) for e in found],
        "optimizer": [size(int(e.optimizer)) for e in found],
        "exchanged gradients": [size(int(e.exchanged)) for e in found],
        "average, reference": [size(int(e.copies)) for e in found],
        "activations, about": ["not known" if e.activations is None else size(int(e.activations)) for e in found],
        "while read": [size(int(e.read)) for e in found],
        "while trained": [size(int(e.total)) for e in found],
        "while saved": [size(int(e.saved)) for e in found],
        f"of {device.name}": [size(int(device.memory)) for _ in found],
    }
    made = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    made.add_column("each process")
    for e in found:
        made.add_column(Text(e.stage), justify="right")
    for name, cells in rows.items():
        if any(cell != size(0) for cell in cells):
            made.add_row(name, *cells)
    return made


def _estimate(pipeline: Pipeline, stage: Stage, device: Device, world: int, graphs: bool) -> Estimate:
    backbone = _blank(pipeline, stage, device)
    parameters = list(backbone.transformer.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    share = world if pipeline.shard else 1
    copies = (stage.ema is not None) + ("reference" in stage.objective.uses)
    held = 1 + (len(weighted_objectives(stage.objective)) > 1)  # a sum's so far, while the next part makes its own
    return Estimate(
        stage=stage.name,
        parameters=sum(p.numel() for p in parameters),
        trainable=trainable,
        weights=sum(p.numel() * p.element_size() for p in parameters) / share,
        gradients=held * trainable * MASTER / share,
        optimizer=2 * trainable * MASTER / share,
        exchanged=trainable * MASTER if world > share else 0.0,
        copies=copies * trainable * MASTER / share,
        gathered=max(p.numel() for p in parameters) * MASTER if share > 1 else 0.0,
        activations=_activations(pipeline, stage, backbone, device, world) if graphs else None,
    )


def _blank(pipeline: Pipeline, stage: Stage, device: Device) -> Any:
    """A copy of the backbone as training has it, without weights."""
    with memory.uncollected("torch"):
        import torch

    small = device.half(pipeline.precision) and pipeline.freezes_in_half(stage)
    backbone: Any = evolve(cast(Any, pipeline.backbone))
    backbone.load_blank(torch.bfloat16 if small else torch.float32)
    weights.make_trainable(backbone, pipeline.mode(stage))
    return backbone


def _activations(pipeline: Pipeline, stage: Stage, backbone: Any, device: Device, world: int) -> int | None:
    """Bytes of the largest forward and backward. Compiled, a network keeps less: what is cheap to compute again."""
    if not backbone.condition_shapes():
        return None
    half = device.half(pipeline.precision)
    rows = max(1, min(stage.micro_batch or stage.rows, stage.rows // world)) * stage.objective.rows_per_graph
    sizes = buckets.sizes(pipeline.data.size, pipeline.data.aspects, backbone)
    shape = (rows, *max((backbone.latent_shape(each) for each in sizes), key=math.prod))
    return fake.peak(backbone, shape, half=half, gpu=device.gpu)


def _helps(pipeline: Pipeline, stage: Stage, e: Estimate, device: Device, world: int) -> Iterator[str]:
    full = isinstance(pipeline.mode(stage), Full)
    if full:
        yield 'train = { use = "lora" }'
    elif not device.half(pipeline.precision):
        yield 'precision = "bf16"'
    if stage.ema is not None:
        yield f"{stage.name}.ema left out"
    whole = (e.certain - e.exchanged) * (world if pipeline.shard else 1)
    yield f"shard = true on {math.ceil(whole / (device.memory * FILLED))} devices or more"


def _count(number: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)
