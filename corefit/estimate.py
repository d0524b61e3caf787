"""What a stage needs of a device's memory, from the network's config alone: nothing is read, nothing is allocated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from attrs import evolve, frozen

from corefit import weights
from corefit.errors import ConfigError
from corefit.pipeline import Full, Pipeline, Stage
from corefit.types import Condition

if TYPE_CHECKING:
    import torch

GIB = 1 << 30
MASTER = 4
"""Bytes of a number that trains, and of its gradient and moments: all are float32."""


@frozen(kw_only=True)
class Estimate:
    """Of one stage, for one process.

    parameters, trainable               numbers
    weights, gradients, optimizer, copies  bytes; copies are the average and the reference policy
    activations                         bytes of the largest graph of a step, None where the backbone cannot tell
    """

    stage: str
    parameters: int
    trainable: int
    weights: float
    gradients: float
    optimizer: float
    copies: float
    activations: float | None

    @property
    def certain(self) -> float:
        """Bytes that are there from the first step to the last."""
        return self.weights + self.gradients + self.optimizer + self.copies

    @property
    def total(self) -> float:
        """With activations, where they are known."""
        return self.certain + (self.activations or 0)


def estimates(pipeline: Pipeline, *, half: bool, world: int = 1) -> list[Estimate]:
    """Of every stage; nothing for a backbone that cannot build its network from a config.

    half   bfloat16 arithmetic: weights that do not train are kept so
    world  processes; they share what is sharded, and each step's rows
    """
    if not hasattr(pipeline.backbone, "blank"):
        return []
    return [_estimate(pipeline, stage, half, world) for stage in pipeline.stage]


def refuse(pipeline: Pipeline, found: Sequence[Estimate], memory: float, world: int = 1) -> None:
    """ConfigError where a stage cannot fit, with what would help."""
    for estimate, stage in zip(found, pipeline.stage, strict=False):
        if estimate.certain <= memory:
            continue
        full = isinstance(pipeline.mode(stage), Full)
        helps = [
            *(['train = { use = "lora" }'] if full else []),
            *([f"{stage.name}.ema left out"] if stage.ema is not None else []),
            *([f"shard = true on {_ranks(estimate, memory, world)} devices or more"]),
        ]
        raise ConfigError(
            f"stage.{stage.name}: weights, gradients and optimizer take {_gib(estimate.certain)} of a device that has "
            f"{_gib(memory)}; what would help: {', or '.join(helps)}"
        )


def capacity() -> tuple[float, str]:
    """Bytes of the device's memory, and what it is."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory), torch.cuda.get_device_name(0)
    return float(psutil.virtual_memory().total), "main memory"


def table(found: Sequence[Estimate], memory: float, device: str) -> Iterator[str]:
    """A line a stage."""
    for e in found:
        graph = "unknown" if e.activations is None else _gib(e.activations)
        yield (
            f"  {e.stage}: {_count(e.parameters)} parameters, {_count(e.trainable)} train; weights {_gib(e.weights)}, "
            f"gradients {_gib(e.gradients)}, optimizer {_gib(e.optimizer)}"
            f"{f', copies {_gib(e.copies)}' if e.copies else ''}, activations about {graph}: "
            f"{_gib(e.total)} of {_gib(memory)} ({device})"
        )
        if e.total > memory:
            yield (
                f"  {e.stage}: that may be too much; a smaller micro_batch helps, or "
                "gradient_checkpointing = true under [backbone]"
            )


def _estimate(pipeline: Pipeline, stage: Stage, half: bool, world: int) -> Estimate:
    import torch

    mode, share = pipeline.mode(stage), world if pipeline.shard else 1
    small = half and not isinstance(mode, Full)
    backbone: Any = _blank(pipeline.backbone, torch.bfloat16 if small else torch.float32)
    trainable = sum(p.numel() for p in weights.trainable(backbone, mode).values())
    parameters = list(backbone.transformer.parameters())
    held = sum(p.numel() * p.element_size() for p in parameters)
    rows = max(1, min(stage.micro_batch or stage.rows, stage.rows // world))
    graph = _activations(backbone, pipeline, rows * getattr(stage.objective, "rows_per_graph", 1), half)
    copies = (stage.ema is not None) + ("reference" in stage.objective.uses)
    return Estimate(
        stage=stage.name,
        parameters=sum(p.numel() for p in parameters),
        trainable=trainable,
        weights=held / share,
        gradients=trainable * MASTER / share,
        optimizer=2 * trainable * MASTER / share,
        copies=copies * trainable * MASTER / share,
        activations=graph,
    )


def _blank(backbone: Any, dtype: torch.dtype) -> Any:
    """A copy with a network on the meta device: shapes and no memory."""
    import torch

    made, usual = evolve(backbone), torch.get_default_dtype()
    made.place(torch.device("cpu"), dtype)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            made.transformer = made.blank()
    finally:
        torch.set_default_dtype(usual)
    return made


def _activations(backbone: Any, pipeline: Pipeline, rows: int, half: bool) -> float | None:
    """Bytes that autograd keeps of one forward of `rows`; with checkpointing, inputs of blocks and one block.

    The forward runs on fake tensors of the CPU, whose kernels keep what those of a GPU keep; attention on the meta
    device would keep its matrix.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.func import functional_call

    if not hasattr(backbone, "condition_shapes"):
        return None
    # of several networks the one that a whole batch may go through: which rows go where is not known here
    network = getattr(backbone.transformer, "busiest", backbone.transformer)
    shape = backbone.latent_shape(pipeline.data.size)
    blocks, inputs, saved = _blocks(network), dict[int, int](), dict[int, int]()
    kept: list[Any] = []  # or another storage may get a place that was counted

    def count(t: torch.Tensor, into: dict[int, int]) -> torch.Tensor:
        if _place(t) not in own:
            kept.append(t)
            into[_place(t)] = t.untyped_storage().nbytes()
        return t

    def enters(_: Any, args: tuple[Any, ...], keys: Mapping[str, Any]) -> None:
        for t in (*args, *keys.values()):
            if isinstance(t, torch.Tensor):
                count(t, inputs)

    for block in blocks:
        block.register_forward_pre_hook(enters, with_kwargs=True)
    cast: Any = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()
    with FakeTensorMode():
        tensors = {name: _fake(t) for name, t in (*network.named_parameters(), *network.named_buffers())}
        own = {_place(t) for t in tensors.values()}
        backbone.transformer = lambda **keys: functional_call(network, tensors, (), keys)  # pyright: ignore
        x, sigma = torch.empty(rows, *shape), torch.empty(rows)
        cond = Condition({name: torch.empty(rows, *shape) for name, shape in backbone.condition_shapes().items()})
        with torch.autograd.graph.saved_tensors_hooks(lambda t: count(t, saved), lambda t: t), cast:
            backbone.velocity(x, sigma, cond)
    whole = float(sum(saved.values()))
    return sum(inputs.values()) + whole / max(1, len(blocks)) if backbone.gradient_checkpointing else whole


def _fake(t: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.empty(t.shape, dtype=t.dtype, requires_grad=t.requires_grad)


def _place(t: torch.Tensor) -> int:
    """Which storage it lies in."""
    from torch.multiprocessing.reductions import StorageWeakRef

    return StorageWeakRef(t.untyped_storage()).cdata


def _blocks(transformer: torch.nn.Module) -> list[Any]:
    """The repeated blocks: items of the outermost lists."""
    from torch import nn

    lists = {name: m for name, m in transformer.named_modules() if isinstance(m, nn.ModuleList)}
    return [b for name, m in lists.items() if not any(name.startswith(f"{o}.") for o in lists) for b in m]


def _ranks(estimate: Estimate, memory: float, world: int) -> int:
    whole = estimate.certain * world
    return int(-(-whole // (memory * 0.8)))


def _count(number: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


def _gib(size: float) -> str:
    return f"{size / GIB:.3g} GiB" if size >= 0.1 * GIB else f"{size / (1 << 20):.3g} MiB"
