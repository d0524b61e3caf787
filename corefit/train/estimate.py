"""How much of a device's memory a stage needs, from the network's config alone: no weight is read or allocated."""

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
from corefit.train.frozen import Frozen, bytes_of
from corefit.types import Sized
from corefit.types.objective import moving_copies, weighted_objectives
from corefit.types.stage import Full, Stage

if TYPE_CHECKING:
    from rich.table import Table

MASTER = 4
"""Bytes of a trainable number, of its gradient and of each of its moments: all are float32."""
FILLED = 0.8
"""Share of a device that sharded weights may take; the rest is for activations."""


@frozen
class Device:
    """The device of each process of a run: its bytes of memory, and whether it is a GPU."""

    name: str
    memory: float
    gpu: bool
    planned: bool = False
    """Whether it is a GPU of another machine. Such a one is taken to have bfloat16; the GPU of this one is asked."""

    @staticmethod
    def here() -> Device:
        """Return the device of this machine."""
        import psutil

        if cuda.may_be_there():
            import torch

            if torch.cuda.is_available():
                return Device(torch.cuda.get_device_name(), float(torch.cuda.mem_get_info()[1]), gpu=True)
        return Device("main memory", float(psutil.virtual_memory().total), gpu=False)

    @staticmethod
    def of(memory: float) -> Device:
        """Return a GPU of so many bytes, which this machine need not have."""
        return Device("the GPU planned", memory, gpu=True, planned=True)

    def half(self, precision: str) -> bool:
        """Return whether a pipeline's `precision` means bfloat16 on this device."""
        return is_half(precision) or (self.planned and precision == "auto")


@frozen(kw_only=True)
class Estimate:
    """The memory that one stage takes on one process.

    parameters, trainable          how many numbers the network has, and how many of them train
    weights, gradients, optimizer  bytes
    exchanged                      bytes of DDP's buckets, a second copy of the gradients for the exchange
    copies                         bytes of the average (ema), of the reference policy and of moving copies
    gathered                       bytes of the largest weight, which is gathered from its shards to be saved
    decoder                        bytes of the decoder of latents, for a stage that decodes
    rewards                        bytes of the networks of rewards, as far as they say (corefit.types.SizedReward)
    activations                    bytes that a step holds at most besides these; None where that is not known
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
    decoder: float = 0.0
    rewards: float = 0.0

    @property
    def read(self) -> float:
        """Bytes while the weights are read: no more than the weights themselves, and what stays from before."""
        return self.weights + self.rewards

    @property
    def saved(self) -> float:
        """Bytes while the last checkpoint and the model are saved; gradients are gone by then."""
        return self.weights + self.optimizer + self.copies + self.gathered + self.decoder + self.rewards

    @property
    def certain(self) -> float:
        """Bytes that are taken from the first step to the last, whatever the batch."""
        trained = self.weights + self.gradients + self.optimizer + self.exchanged + self.copies
        return trained + self.decoder + self.rewards

    @property
    def total(self) -> float:
        """Bytes at most during training, with activations where they are known."""
        return self.certain + (self.activations or 0)


def estimates(pipeline: Pipeline, device: Device, world: int = 1, *, graphs: bool = True) -> list[Estimate]:
    """Estimate every stage; return nothing for a backbone that is not Sized.

    world   number of processes, over which each step's rows, and sharded weights, are split
    graphs  whether to estimate activations too, which takes seconds
    """
    if not isinstance(pipeline.backbone, Sized):
        return []
    return [_estimate(pipeline, stage, device, world, graphs) for stage in pipeline.stage]


def refuse(pipeline: Pipeline, found: Sequence[Estimate], device: Device, world: int = 1) -> None:
    """Raise ConfigError, with what would help, where a stage cannot fit. Activations, a mere estimate, do not count."""
    for e, stage in zip(found, pipeline.stage, strict=False):
        needed = max(e.certain, e.saved)
        if needed > device.memory:
            parts = {
                "weights": e.weights,
                "gradients": e.gradients,
                "optimizer": e.optimizer,
                "gradients being exchanged": e.exchanged,
                "copies": e.copies,
                "the decoder": e.decoder,
                "rewards": e.rewards,
                "the largest weight while it is saved": e.gathered if e.saved > e.certain else 0.0,
            }
            named = ", ".join(f"{name} {size(int(part))}" for name, part in parts.items() if part)
            helps = ", or ".join(_helps(pipeline, stage, e, device, world))
            raise ConfigError(
                f"stage.{stage.name}: {named} are {size(int(needed))} for each process, and {device.name} has "
                f"{size(int(device.memory))}; what would help: {helps}"
            )


def show(found: Sequence[Estimate], device: Device) -> None:
    """Print a table of the stages, and a line for each that may not fit because of its activations."""
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
    """Make a table with a column for each stage."""
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
        "average, reference, copies": [size(int(e.copies)) for e in found],
        "decoder": [size(int(e.decoder)) for e in found],
        "rewards": [size(int(e.rewards)) for e in found],
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
    copies = (stage.ema is not None) + ("reference" in stage.objective.uses) + len(moving_copies(stage.objective))
    beside = Frozen.of(pipeline, stage, backbone)
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
        decoder=bytes_of(beside.decoder) if beside.decoder else 0.0,
        rewards=sum(map(bytes_of, beside.rewards)),
        activations=_activations(pipeline, stage, backbone, beside, device, world) if graphs else None,
    )


def _blank(pipeline: Pipeline, stage: Stage, device: Device) -> Any:
    """Return a copy of the backbone, set up for training, whose weights have a shape and no memory."""
    with memory.uncollected("torch"):
        import torch

    small = device.half(pipeline.precision) and pipeline.freezes_in_half(stage)
    backbone: Any = evolve(cast(Any, pipeline.backbone))
    backbone.load_blank(torch.bfloat16 if small else torch.float32)
    weights.make_trainable(backbone, pipeline.mode(stage))
    return backbone


def _activations(
    pipeline: Pipeline, stage: Stage, backbone: Any, beside: Frozen, device: Device, world: int
) -> int | None:
    """Estimate the bytes of the largest forward and backward; a compiled network keeps less, for it recomputes some."""
    if not backbone.condition_shapes():
        return None
    half = device.half(pipeline.precision)
    rows = max(1, min(stage.micro_batch or stage.rows, stage.rows // world))
    sizes = buckets.sizes(pipeline.data.size, pipeline.data.aspects, backbone)
    shape = max((backbone.latent_shape(each) for each in sizes), key=math.prod)
    graph = (rows * stage.objective.rows_per_graph, *shape)
    decoded = (rows, *shape) if "reward_gradient" in stage.objective.uses else None
    return fake.peak(backbone, graph, decoded, beside, half=half, gpu=device.gpu)


def _helps(pipeline: Pipeline, stage: Stage, e: Estimate, device: Device, world: int) -> Iterator[str]:
    full = isinstance(pipeline.mode(stage), Full)
    if full:
        yield 'train = { use = "lora" }'
    elif not device.half(pipeline.precision):
        yield 'precision = "bf16"'
    if stage.ema is not None:
        yield f"{stage.name}.ema left out"
    if e.rewards:
        yield 'device = "cpu" for a reward'
    each = e.decoder + e.rewards  # which are not sharded
    whole, room = (e.certain - e.exchanged - each) * (world if pipeline.shard else 1), device.memory * FILLED - each
    if room > 0:
        yield f"shard = true on {math.ceil(whole / room)} devices or more"


def _count(number: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)
