"""Which weights train, how they are sharded and saved, and copies of them: average, reference, moving copies.

A weight is a plain tensor on every rank, or, sharded (FSDP2), a DTensor of which each rank holds a shard. Sharded
weights are read and written one tensor at a time: no device and no process ever holds a second copy of the network.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define

from corefit.errors import ConfigError
from corefit.system.ranks import Ranks
from corefit.types import Backbone, Moving, StoredTensors, Streamed
from corefit.types.blame import require_result
from corefit.types.objective import Objective, moving_copies, weighted_objectives
from corefit.types.stage import Full, Lora

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Parameter

Trainable = Mapping[str, "Parameter"]
"""The parameters that train, by name."""


def load(
    backbone: Backbone,
    ranks: Ranks,
    *,
    frozen_in_bf16: bool,
    adapter: Path | None = None,
    mode: Full | Lora | None = None,
    seed: int = 0,
) -> Trainable:
    """Read the network, or this rank's shards of it, onto this rank's device; return the parameters that train.

    Training and evaluation both read weights here, so that what is evaluated is computed as it was trained.

    frozen_in_bf16  whether weights that do not train are held in bfloat16
    adapter         folder of a LoRA to put on the network
    mode            which weights train; None for none, in evaluation
    seed            seed of a new adapter's random factor (lora_A)
    """
    import torch

    dtype = torch.bfloat16 if frozen_in_bf16 else torch.float32
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
            seed_adapter(trainable(backbone.transformer), seed)
    if ranks.sharded:
        shard(backbone.transformer, ranks.device)
        if streamed:
            fill(backbone.transformer, streamed, ranks.device)
        backbone.place(ranks.device, dtype)
    return trainable(backbone.transformer) if mode else {}


def make_trainable(backbone: Backbone, mode: Full | Lora) -> Trainable:
    """Set a loaded backbone up for full or LoRA training; return the parameters that train, in float32.

    An adapter that the network has already, from the previous stage, is trained further.
    """
    transformer = backbone.transformer
    if isinstance(mode, Full):
        transformer.requires_grad_(True)
    elif not getattr(transformer, "peft_config", None):
        transformer.requires_grad_(False)
        _add_adapter(transformer, mode, mode.targets or tuple(backbone.lora_targets))
    transformer.train()
    parameters = trainable(transformer)
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    return parameters


def trainable(transformer: torch.nn.Module) -> Trainable:
    """Return the parameters that train, by name."""
    return {name: p for name, p in transformer.named_parameters() if p.requires_grad}


def _add_adapter(transformer: Any, mode: Lora, targets: tuple[str, ...]) -> None:
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
    """Allocate a new adapter in main memory where peft put it on the meta device, with the weights that it adapts."""
    import torch

    blank = {name: p for name, p in trainable(transformer).items() if p.is_meta}
    allocated = {name: torch.zeros(p.shape, dtype=p.dtype) for name, p in blank.items()}
    transformer.load_state_dict(allocated, strict=False, assign=True)


def _check_rank(transformer: torch.nn.Module, rank: int, targets: tuple[str, ...]) -> None:
    """Raise ConfigError for a rank that no adapted module can have, before memory is allocated for it."""
    adapted = tuple(f".{target}" for target in targets)
    found = [module for name, module in transformer.named_modules() if f".{name}".endswith(adapted)]
    widest = max(filter(None, map(_width, found)), default=None)
    if widest is not None and rank > widest:
        raise ConfigError(
            f"backbone.train.rank = {rank}: the widest module that it adapts has rank {widest}; give that or less"
        )


def _width(module: Any) -> int | None:
    """Return the rank of a module's weight at most; None where there is no matrix. A packed weight has other shapes."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim < 2:
        return None
    return min(getattr(module, "out_features", weight.shape[0]), getattr(module, "in_features", weight[0].numel()))


def seed_adapter(parameters: Trainable, seed: int) -> None:
    """Draw the adapter's random factor (lora_A) from `seed` and its name: the same on every rank, in every run."""
    import torch

    from corefit.rng import generator

    for name, parameter in parameters.items():
        if ".lora_A." in name:
            draw = generator(seed, "lora", name).standard_normal(tuple(parameter.shape), "float32")
            parameter.data.copy_(torch.from_numpy(draw) / parameter.shape[0])


def shard(transformer: torch.nn.Module, device: torch.device) -> None:
    """Shard every parameter over the ranks (FSDP2). Each item of a ModuleList, a block, is gathered by itself."""
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
    """Return whether `shard` has been called on the network."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(transformer, FSDPModule)


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this rank's shards of DTensors, and other tensors themselves; the memory is shared with them."""
    return [_local(t.detach()) for t in tensors]


def _local(t: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    return t.to_local() if isinstance(t, DTensor) else t


def fill(transformer: torch.nn.Module, backbone: Streamed, device: torch.device) -> None:
    """Read this rank's shard of every weight from the files; an adapter, which has its values already, stays."""
    import torch

    transformer._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)  # pyright: ignore[reportPrivateUsage]
    with torch.no_grad(), backbone.stored() as stored:
        for name, tensor in transformer.state_dict().items():
            if not is_adapter(name):
                _local(tensor).copy_(stored[plain_name(name)][_local_rows(tensor)])


def _local_rows(tensor: Any) -> slice:
    """Return which rows of a tensor this rank holds: all, or those that fully_shard gives it, cut as by torch.chunk."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return slice(None)
    size = -(-tensor.shape[0] // tensor.device_mesh.size())
    start = min(size * tensor.device_mesh.get_local_rank(), tensor.shape[0])
    return slice(start, start + len(tensor.to_local()))


def plain_name(name: str) -> str:
    """Return a weight's name without what peft puts into it."""
    return name.replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    """Return whether a weight of this name belongs to a LoRA."""
    return ".lora_" in name


def save(backbone: Backbone, folder: Path, ranks: Ranks, mode: Full | Lora, *, in_bf16: bool = False) -> float | None:
    """Write what `mode` has trained to `folder`, which rank 0 has made; every rank must call this.

    Sharded weights are gathered one at a time, and rank 0 writes them.

    in_bf16  round the weights to bfloat16, and return how much of training the rounding left: of the numbers that
             training moved, the share that still differ from the start once both are rounded. None is returned where
             nothing is rounded, or where the backbone's files cannot be read again (Streamed) for a comparison.
    """
    streamed = backbone if isinstance(backbone, Streamed) else None
    with streamed.stored() if streamed and in_bf16 and ranks.main else nullcontext({}) as start:
        saved = Saved(whole(backbone.transformer), start, to_bf16 if in_bf16 else None)
        if ranks.main and streamed:
            streamed.save_tensors(folder, saved)
        elif ranks.main:
            _save_at_once(backbone, folder, saved, mode)
        deque(saved, maxlen=0)  # the other ranks take part in gathering what rank 0 writes
    return saved.survived


def to_bf16(name: str, tensor: Tensor) -> Tensor:
    """Round a tensor to bfloat16."""
    import torch

    return tensor.to(torch.bfloat16)


@define(eq=False)
class Saved:
    """Iterates over (name, tensor) of what is saved, rounded, and counts what the rounding changes.

    start    the weights before training, where they are known
    rounded  rounds the tensor of a name; None where nothing is rounded
    moved    how many numbers training has changed
    kept     how many of those still differ from the start once both are rounded
    """

    tensors: Iterable[tuple[str, Tensor]]
    start: StoredTensors
    rounded: Callable[[str, Tensor], Tensor] | None
    moved: int = 0
    kept: int = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.tensors:
            yield name, self.take(name, tensor)

    def take(self, name: str, tensor: Tensor) -> Tensor:
        """Return one tensor, rounded and counted."""
        if self.rounded is None or not tensor.is_floating_point():
            return tensor
        rounded = self.rounded(name, tensor)
        if name in self.start:
            before = self.start[name][...].to(tensor)
            self.moved += int((tensor != before).sum())
            self.kept += int(((rounded != self.rounded(name, before)) & (tensor != before)).sum())
        return rounded

    @property
    def survived(self) -> float | None:
        """`kept` as a share of `moved`, once all tensors have been taken; None where nothing was compared."""
        return self.kept / self.moved if self.moved else None


def _save_at_once(backbone: Backbone, folder: Path, tensors: Iterable[tuple[str, Tensor]], mode: Full | Lora) -> None:
    """Save a backbone that is not Streamed; where it is sharded, through an unsharded copy in main memory."""
    import torch

    unsharded = backbone
    if is_sharded(backbone.transformer):
        unsharded = copy.copy(backbone)
        unsharded.load(torch.device("cpu"), torch.float32)
        make_trainable(unsharded, mode)
    write(unsharded, folder, tensors)


def write(backbone: Backbone, folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Save the tensors to `folder` in place of the backbone's own: those of its LoRA if it has one, else all.

    A Streamed backbone may be without weights, and its tensors come in the order of `transformer.state_dict()`.
    """
    if isinstance(backbone, Streamed):
        backbone.save_tensors(folder, tensors)
        return
    parameters = dict(backbone.transformer.named_parameters())
    for name, tensor in tensors:
        if name in parameters:
            parameters[name].data = tensor.to(parameters[name].device)
    backbone.save(folder)


def whole(transformer: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, unsharded tensor) of what is saved: a LoRA's weights where the network has one, else all.

    A sharded tensor is gathered when it is taken, so every rank must take them all.
    """
    tensors = transformer.state_dict()
    adapted = any(map(is_adapter, tensors))
    for name, tensor in tensors.items():
        if is_adapter(name) or not adapted:
            full: Any = tensor.detach()
            yield name, full.full_tensor() if is_sharded(transformer) and hasattr(full, "full_tensor") else full


@define(eq=False)
class Ema:
    """An exponential moving average of the weights that train, in float32 on the same device."""

    decay: float
    average: dict[str, Tensor]

    @staticmethod
    def of(trained: Trainable, decay: float) -> Ema:
        """Start the average at the weights as they are now."""
        return Ema(decay, copied(trained))

    def update(self, trained: Trainable, skipped: Tensor) -> None:
        """Set average <- decay * average + (1 - decay) * weights unless skipped (bool []), without waiting for it."""
        import torch

        share = torch.where(skipped, 0.0, 1 - self.decay)
        old, new = local(self.average.values()), local(trained.values())
        torch._foreach_lerp_(old, new, [share] * len(old))  # pyright: ignore[reportPrivateUsage]

    @contextmanager
    def in_place_of(self, transformer: torch.nn.Module, trained: Trainable) -> Generator[None]:
        """Within, the network has the average in place of its weights; afterwards it has them back, to the bit."""
        self._swap(transformer, trained)
        try:
            yield
        finally:
            self._swap(transformer, trained)

    def _swap(self, transformer: Any, trained: Trainable) -> None:
        """Exchange average and weights one tensor at a time, so that no copy of all of them is made."""
        if is_sharded(transformer):
            transformer.reshard()  # weights that are still gathered would be used in place of the new shards
        for weight, average in zip(local(trained.values()), local(self.average.values()), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)


def copied(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of the weights as they are now."""
    return {name: p.detach().clone() for name, p in trained.items()}


def called_with(backbone: Backbone, trained: Trainable, others: Mapping[str, Tensor]) -> Backbone:
    """Return the same backbone, frozen: called with the tensors `others` in place of the weights that train.

    The tensors are not copied, so the backbone returned follows what is written to them. Its results have no graph:
    sharded, backward would gather the weights that train in their place.
    """
    import torch
    from torch import nn
    from torch.func import functional_call

    transformer = backbone.transformer
    tensors = dict(others)

    class Frozen(nn.Module):
        @torch.no_grad()
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if not is_sharded(transformer):
                return functional_call(transformer, tensors, args, kwargs)
            with _with_weights(transformer, trained, tensors):
                return transformer(*args, **kwargs)

    frozen = copy.copy(backbone)
    frozen.transformer = Frozen()
    return frozen


@define(eq=False)
class MovingCopy:
    """A copy of the weights that train, which follows them as an objective declares (corefit.Moving).

    objective  the one that declares it; messages name it
    """

    name: str
    objective: Objective[Any]
    moving: Moving
    tensors: Mapping[str, Tensor]

    @staticmethod
    def declared(objective: Objective[Any], trained: Trainable) -> dict[str, MovingCopy]:
        """Return the copies that an objective declares, by name; they start at the weights as they are now."""
        return {
            name: MovingCopy(name, each.value, moving, copied(trained))
            for each in weighted_objectives(objective)
            for name, moving in moving_copies(each.value).items()
        }

    def move(self, trained: Trainable, n: int) -> None:
        """Make the n-th move of the stage, counted from 1; raise PluginError if the decay is not in [0, 1]."""
        import torch

        decay = self.moving.decay(n)
        what = f"the decay at move {n} of the copy {self.name!r}"
        require_result(decay, _is_share, self.objective, what, "a number from 0 to 1")
        old, new = local(self.tensors.values()), local(trained.values())
        torch._foreach_lerp_(old, new, 1 - float(decay))  # pyright: ignore[reportPrivateUsage]


def _is_share(value: Any) -> bool:
    return isinstance(value, Real) and 0 <= value <= 1  # pyright: ignore[reportOperatorIssue]


@contextmanager
def _with_weights(transformer: Any, trained: Trainable, others: Mapping[str, Tensor]) -> Generator[None]:
    """Within, a sharded network has other weights. FSDP2 gathers parameters itself, so they cannot be passed in."""
    import torch

    weights = local(trained.values())
    kept = [t.clone() for t in weights]
    transformer.reshard()
    torch._foreach_copy_(weights, local(others.values()))  # pyright: ignore[reportPrivateUsage]
    try:
        yield
    finally:
        transformer.reshard()
        torch._foreach_copy_(weights, kept)  # pyright: ignore[reportPrivateUsage]
