"""Which weights train, how they lie on the ranks, and copies of them: the average (EMA) and the reference policy.

A weight is a plain tensor on every rank, or, sharded (FSDP2), a DTensor of which a rank holds a part. Sharded weights
are read and written a tensor at a time: no device and no process ever holds a second copy of the whole.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define

from corefit.errors import ConfigError
from corefit.system.ranks import Ranks
from corefit.types import Backbone, StoredTensors, Streamed
from corefit.types.stage import Full, Lora

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Parameter

Trainable = Mapping[str, "Parameter"]


def load(
    backbone: Backbone,
    ranks: Ranks,
    *,
    half: bool,
    adapter: Path | None = None,
    mode: Full | Lora | None = None,
    seed: int = 0,
) -> Trainable:
    """Read the network onto this rank's device, whole or this rank's shards of it; the parameters that train.

    Training and evaluation both read weights here, so what is judged is computed as it was trained.

    half     hold weights that do not train in bfloat16
    adapter  folder of a LoRA that is put on the network
    mode     which weights train; None where none do
    seed     of a new adapter's random half
    """
    import torch

    dtype = torch.bfloat16 if half else torch.float32
    streamed = backbone if ranks.sharded and isinstance(backbone, Streamed) else None
    if streamed:
        streamed.load_empty(dtype)
    else:
        backbone.load(torch.device("cpu") if ranks.sharded else ranks.device, dtype)
    if adapter:
        backbone.load_lora(adapter)
    if mode:
        make_trainable(backbone, mode)
        if isinstance(mode, Lora) and not adapter:
            _materialize_adapter(backbone.transformer)
            seeded_adapter(trainable(backbone.transformer), seed)
    if ranks.sharded:
        shard(backbone.transformer, ranks.device)
        if streamed:
            fill(backbone.transformer, streamed, ranks.device)
        backbone.place(ranks.device, dtype)
    return trainable(backbone.transformer) if mode else {}


def make_trainable(backbone: Backbone, mode: Full | Lora) -> Trainable:
    """Set up full or LoRA training of a loaded backbone; the parameters that train, by name, in float32.

    An adapter that is there already (of the stage before) trains on.
    """
    transformer = backbone.transformer
    if isinstance(mode, Full):
        transformer.requires_grad_(True)
    elif not getattr(transformer, "peft_config", None):
        transformer.requires_grad_(False)
        _adapt(transformer, mode, mode.targets or tuple(backbone.lora_targets))
    transformer.train()
    trained = trainable(transformer)
    for parameter in trained.values():
        parameter.data = parameter.data.float()
    return trained


def trainable(transformer: torch.nn.Module) -> Trainable:
    """The parameters that train, by name."""
    return {name: p for name, p in transformer.named_parameters() if p.requires_grad}


def _adapt(transformer: Any, mode: Lora, targets: tuple[str, ...]) -> None:
    from peft import LoraConfig

    _check_rank(transformer, mode.rank, targets)
    try:
        transformer.add_adapter(
            LoraConfig(
                r=mode.rank,
                lora_alpha=mode.rank if mode.alpha is None else mode.alpha,  # pyright: ignore[reportArgumentType]
                init_lora_weights="gaussian",
                target_modules=list(targets),
            )
        )
    except ValueError as error:
        raise ConfigError(f"backbone.train.targets: {', '.join(targets)}: {error}") from error


def _materialize_adapter(transformer: Any) -> None:
    """Give a new adapter memory where its network has none yet; peft puts it beside the weights that it adapts."""
    import torch

    blank = {name: p for name, p in trainable(transformer).items() if p.is_meta}
    made = {name: torch.zeros(p.shape, dtype=p.dtype) for name, p in blank.items()}
    transformer.load_state_dict(made, strict=False, assign=True)


def _check_rank(transformer: torch.nn.Module, rank: int, targets: tuple[str, ...]) -> None:
    """ConfigError for a rank that no module could have, before memory for it is asked for."""
    named = ((name, getattr(module, "weight", None)) for name, module in transformer.named_modules())
    found = [w for name, w in named if w is not None and f".{name}".endswith(tuple(f".{t}" for t in targets))]
    widest = max((min(w.shape[0], w[0].numel()) for w in found if w.ndim > 1), default=None)
    if widest is not None and rank > widest:
        raise ConfigError(
            f"backbone.train.rank = {rank}: the widest module that it adapts has rank {widest}; give that or less"
        )


def seeded_adapter(trained: Trainable, seed: int) -> None:
    """Draw the adapter's random half again, keyed, so that every rank and every start has the same."""
    import torch

    from corefit.rng import generator

    for name, parameter in trained.items():
        if ".lora_A." in name:
            draw = generator(seed, "lora", name).standard_normal(tuple(parameter.shape), "float32")
            parameter.data.copy_(torch.from_numpy(draw) / parameter.shape[0])


def shard(transformer: torch.nn.Module, device: torch.device) -> None:
    """Split every parameter over the ranks of `device` (FSDP2), block by block: items of its ModuleLists."""
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    lists = {name: m for name, m in transformer.named_modules() if isinstance(m, nn.ModuleList)}
    outer = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    for block in (block for blocks in outer for block in blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(transformer, mesh=mesh)


def is_sharded(transformer: torch.nn.Module) -> bool:
    """Whether `shard` has split it."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(transformer, FSDPModule)


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this rank holds of each, sharing memory with it."""
    return [_part(t.detach()) for t in tensors]


def _part(t: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    return t.to_local() if isinstance(t, DTensor) else t


def fill(transformer: torch.nn.Module, backbone: Streamed, device: torch.device) -> None:
    """Read this rank's part of every weight from the files; what has memory already, an adapter, stays as it is."""
    import torch

    transformer._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)  # pyright: ignore[reportPrivateUsage]
    with torch.no_grad(), backbone.stored() as stored:
        for name, tensor in transformer.state_dict().items():
            if not is_adapter(name):
                _part(tensor).copy_(stored[plain_name(name)][_rows(tensor)])


def _rows(tensor: Any) -> slice:
    """Which rows of a tensor this rank holds: all, or those that fully_shard gives it, which are torch.chunk's."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return slice(None)
    size = -(-tensor.shape[0] // tensor.device_mesh.size())
    start = min(size * tensor.device_mesh.get_local_rank(), tensor.shape[0])
    return slice(start, start + len(tensor.to_local()))


def plain_name(name: str) -> str:
    """A weight's name without what peft puts into it."""
    return name.replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    """Whether a weight of this name is a LoRA's."""
    return ".lora_" in name


def save(backbone: Backbone, folder: Path, ranks: Ranks, mode: Full | Lora, *, half: bool = False) -> float | None:
    """Write what `mode` has trained to `folder`, which the first rank has made; every rank must call this.

    Sharded weights are gathered one at a time, and the first rank writes them.

    half  round the weights to bfloat16. Then the share of those that training has moved which still differ from the
          start, as that would be rounded, is returned: None where the backbone cannot tell what it started from.
    """
    streamed = backbone if isinstance(backbone, Streamed) else None
    with streamed.stored() if streamed and half and ranks.main else nullcontext({}) as start:
        written = Written(whole(backbone.transformer), start, half=half)
        if ranks.main and streamed:
            streamed.save_tensors(folder, written)
        elif ranks.main:
            _save_whole(backbone, folder, written, mode)
        deque(written, maxlen=0)  # the other ranks send what the first one writes
    return written.survived


@define(eq=False)
class Written:
    """(name, tensor) of each tensor that is saved, rounded where `half` says so, and what the rounding has left."""

    tensors: Iterator[tuple[str, Tensor]]
    start: StoredTensors
    half: bool
    moved: int = 0
    kept: int = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.tensors:
            yield name, self._rounded(name, tensor) if self.half and tensor.is_floating_point() else tensor

    def _rounded(self, name: str, tensor: Tensor) -> Tensor:
        import torch

        rounded = tensor.to(torch.bfloat16)
        if name in self.start:
            before = self.start[name][...].to(tensor)
            self.moved += int((tensor != before).sum())
            self.kept += int(((rounded != before.to(torch.bfloat16)) & (tensor != before)).sum())
        return rounded

    @property
    def survived(self) -> float | None:
        return self.kept / self.moved if self.moved else None


def _save_whole(backbone: Backbone, folder: Path, tensors: Iterable[tuple[str, Tensor]], mode: Full | Lora) -> None:
    """Save a backbone that is not Streamed; where it is sharded, through a second network in main memory."""
    import torch

    made = backbone
    if is_sharded(backbone.transformer):
        made = copy.copy(backbone)
        made.load(torch.device("cpu"), torch.float32)
        make_trainable(made, mode)
    parameters = dict(made.transformer.named_parameters())
    for name, tensor in tensors:
        if name in parameters:
            parameters[name].data = tensor.to(parameters[name].device)
    made.save(folder)


def whole(transformer: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, full tensor) of what is saved of a network, its LoRA's alone where it has one; one tensor at a time.

    Every rank must take them all where they are sharded.
    """
    tensors = transformer.state_dict()
    adapted = any(map(is_adapter, tensors))
    for name, tensor in tensors.items():
        if is_adapter(name) or not adapted:
            full: Any = tensor.detach()
            yield name, full.full_tensor() if is_sharded(transformer) and hasattr(full, "full_tensor") else full


@define(eq=False)
class Ema:
    """An exponential moving average of the trained weights, in float32 beside them."""

    decay: float
    average: dict[str, Tensor]

    @staticmethod
    def of(trained: Trainable, decay: float) -> Ema:
        return Ema(decay, {name: p.detach().clone() for name, p in trained.items()})

    def update(self, trained: Trainable, skipped: Tensor) -> None:
        """average <- decay average + (1 - decay) weights unless skipped (bool []), without a sync."""
        import torch

        share = torch.where(skipped, 0.0, 1 - self.decay)
        old, new = local(self.average.values()), local(trained.values())
        torch._foreach_lerp_(old, new, [share] * len(old))  # pyright: ignore[reportPrivateUsage]

    @contextmanager
    def in_place_of(self, transformer: torch.nn.Module, trained: Trainable) -> Generator[None]:
        """Let the network have the average for a while; the weights are then again what they were, to the bit."""
        self._swap(transformer, trained)
        try:
            yield
        finally:
            self._swap(transformer, trained)

    def _swap(self, transformer: Any, trained: Trainable) -> None:
        """Exchange average and weights, one tensor at a time, so that no copy of all of them is made."""
        if is_sharded(transformer):
            transformer.reshard()  # what is still gathered is of the weights before
        for mine, other in zip(local(trained.values()), local(self.average.values()), strict=True):
            kept = mine.clone()
            mine.copy_(other)
            other.copy_(kept)


def reference(backbone: Backbone, trained: Trainable) -> Backbone:
    """The policy as it is now, frozen: the same network called with copies of the trained weights alone."""
    from torch import nn
    from torch.func import functional_call

    transformer = backbone.transformer
    start = {name: p.detach().clone() for name, p in trained.items()}

    class Frozen(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if not is_sharded(transformer):
                return functional_call(transformer, start, args, kwargs)
            with _exchanged(transformer, trained, start):
                return transformer(*args, **kwargs)

    frozen = copy.copy(backbone)
    frozen.transformer = Frozen()
    return frozen


@contextmanager
def _exchanged(transformer: Any, trained: Trainable, start: Mapping[str, Tensor]) -> Generator[None]:
    """The shards of `start` in place of the model's. FSDP2 gathers parameters itself, so they cannot be passed in."""
    import torch

    mine, other = local(trained.values()), local(start.values())
    kept = [t.clone() for t in mine]
    transformer.reshard()
    torch._foreach_copy_(mine, other)  # pyright: ignore[reportPrivateUsage]
    try:
        yield
    finally:
        transformer.reshard()
        torch._foreach_copy_(mine, kept)  # pyright: ignore[reportPrivateUsage]
