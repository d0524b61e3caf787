"""Which weights train, how they are sharded and saved, and copies of them: average, reference, moving copies.

A weight is a plain tensor on every rank, or, sharded (FSDP2), a DTensor of which each rank holds a shard. Sharded
weights are read and written one tensor at a time: no device and no process ever holds a second copy of the network.
"""

from __future__ import annotations

import copy
import gc
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define

from corefit.errors import ConfigError
from corefit.system.ranks import Ranks
from corefit.train.sharding import Sharding, fill, is_adapter, is_sharded, local, reshard, shard
from corefit.types import Backbone, ContextParallel, Moving, Offloading, StoredTensors, Streamed
from corefit.types.blame import require_result
from corefit.types.objective import Objective, moving_copies, weighted_objectives
from corefit.types.pinned import copies_on_host
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
    waiting = offloading(backbone)
    if waiting:
        gc.collect()  # hooks hold the blocks of a network that was used before, which else would take memory still
    if streamed:
        streamed.load_empty(dtype)
    else:
        backbone.load(torch.device("cpu") if ranks.sharded or waiting else ranks.device, dtype)
    if adapter:
        backbone.load_lora(adapter)
    if mode:
        make_trainable(backbone, mode)
        if isinstance(mode, Lora) and not adapter:
            _materialize_adapter(backbone.transformer)
            seed_adapter(trainable(backbone.transformer), seed)
    if ranks.layout.context > 1:
        assert isinstance(backbone, ContextParallel), "the pipeline was not checked"
        backbone.split_context(ranks.layout.context, ranks.device)
    if ranks.sharded:
        shard(backbone.transformer, ranks.device, ranks.layout.replicate)
        if streamed:
            fill(backbone.transformer, streamed, ranks.device)
        backbone.place(ranks.device, dtype)
    elif waiting:
        waiting.settle(ranks.device)
    return trainable(backbone.transformer) if mode else {}


def offloading(backbone: Backbone) -> Offloading | None:
    """Return the backbone if most of its weights wait in main memory while they are not used."""
    return backbone if isinstance(backbone, Offloading) and backbone.offloads else None


def prepare(backbone: Backbone, ranks: Ranks, *, evaluation: bool) -> None:
    """Put the loaded network under autocast, and for training on several processes into DDP."""
    place = False if offloading(backbone) else None  # None moves all of it to the device, where it is already
    backbone.transformer = ranks.accelerator.prepare_model(backbone.transformer, place, evaluation_mode=evaluation)


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
    """An exponential moving average of the weights that train, in float32, on their device or in main memory."""

    decay: float
    average: dict[str, Tensor]

    @staticmethod
    def of(trained: Trainable, decay: float, *, on_host: bool = False) -> Ema:
        """Start the average at the weights as they are now."""
        return Ema(decay, copied(trained, on_host=on_host))

    def update(self, trained: Trainable, skipped: Tensor) -> None:
        """Set average <- decay * average + (1 - decay) * weights unless skipped (bool []), without waiting for it."""
        import torch

        share = torch.where(skipped, 0.0, 1 - self.decay)
        follow(self.average, trained, lambda old, new: _lerp(old, new, [share] * len(old)))

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
            reshard(transformer)  # weights that are still gathered would be used in place of the new shards
        for weight, average in zip(local(trained.values()), local(self.average.values()), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)


def copied(trained: Mapping[str, Tensor], *, on_host: bool = False) -> dict[str, Tensor]:
    """Return a copy of the weights as they are now, on their device or in main memory."""
    held = {name: p.detach() for name, p in trained.items()}
    if on_host and any(t.device.type == "cuda" for t in held.values()):
        return copies_on_host(held)
    return {name: t.to("cpu", copy=True) if on_host else t.clone() for name, t in held.items()}


def follow(
    copies: Mapping[str, Tensor], trained: Trainable, move: Callable[[Sequence[Tensor], Sequence[Tensor]], object]
) -> None:
    """Have `move` change copies in place, given them and the weights, on the device of the weights.

    Copies in main memory are brought there and back one at a time. Nothing waits for the device, which takes up the
    work in order; who reads such a copy on the host must wait for the device first (`settle`).
    """
    old, new = local(copies.values()), local(trained.values())
    if all(held.device == weight.device for held, weight in zip(old, new, strict=True)):
        move(old, new)
        return
    for held, weight in zip(old, new, strict=True):
        brought = held.to(weight.device, non_blocking=True)
        move([brought], [weight])
        held.copy_(brought, non_blocking=True)


def _lerp(old: Sequence[Tensor], new: Sequence[Tensor], share: float | Sequence[Tensor]) -> None:
    """Move each of `old` in place towards its counterpart in `new`, by a share of the way."""
    import torch

    torch._foreach_lerp_(old, new, share)  # pyright: ignore[reportPrivateUsage,reportCallIssue,reportArgumentType]


def settle(device: torch.device) -> None:
    """Wait until the device has written all copies that are in main memory."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def called_with(
    backbone: Backbone, trained: Trainable, others: Mapping[str, Tensor], sharding: Sharding | None = None
) -> Backbone:
    """Return the same backbone, frozen: called with the tensors `others` in place of the weights that train.

    The tensors are not copied, so the backbone returned follows what is written to them; those in main memory are
    brought to the device for each call. Its results have no graph: sharded, backward would gather the weights that
    train in their place.

    sharding  says whether the weights of a sharded network are gathered already, which then need not be moved
    """
    import torch
    from torch import nn
    from torch.func import functional_call

    transformer = backbone.transformer
    tensors = dict(others)

    class Frozen(nn.Module):
        @torch.no_grad()
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            called = sharding.gathered(tensors) if sharding else None
            if called is None and not is_sharded(transformer):
                called = {name: t.to(trained[name].device, non_blocking=True) for name, t in tensors.items()}
            if called is not None:
                return functional_call(transformer, dict(called), args, kwargs)
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
    def declared(objective: Objective[Any], trained: Trainable, *, on_host: bool = False) -> dict[str, MovingCopy]:
        """Return the copies that an objective declares, by name; they start at the weights as they are now."""
        return {
            name: MovingCopy(name, each.value, moving, copied(trained, on_host=on_host))
            for each in weighted_objectives(objective)
            for name, moving in moving_copies(each.value).items()
        }

    def move(self, trained: Trainable, n: int) -> None:
        """Make the n-th move of the stage, counted from 1; raise PluginError if the decay is not in [0, 1]."""

        decay = self.moving.decay(n)
        what = f"the decay at move {n} of the copy {self.name!r}"
        require_result(decay, _is_share, self.objective, what, "a number from 0 to 1")
        share = 1 - float(decay)
        follow(self.tensors, trained, lambda old, new: _lerp(old, new, share))


def _is_share(value: Any) -> bool:
    return isinstance(value, Real) and 0 <= value <= 1  # pyright: ignore[reportOperatorIssue]


@contextmanager
def _with_weights(transformer: Any, trained: Trainable, others: Mapping[str, Tensor]) -> Generator[None]:
    """Within, a sharded network has other weights. FSDP2 gathers parameters itself, so they cannot be passed in."""
    import torch

    weights = local(trained.values())
    kept = [t.clone() for t in weights]
    reshard(transformer)
    torch._foreach_copy_(weights, local(others.values()), non_blocking=True)  # pyright: ignore[reportPrivateUsage]
    try:
        yield
    finally:
        reshard(transformer)
        torch._foreach_copy_(weights, kept)  # pyright: ignore[reportPrivateUsage]
