"""Which weights train, how they lie on the ranks, and copies of them: the average (EMA) and the reference policy.

A weight is a plain tensor on every rank, or, sharded (FSDP2), a DTensor of which a rank holds a part.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from attrs import define

from corefit.errors import ConfigError
from corefit.stage import Full, Lora
from corefit.types import Backbone

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Parameter

Named = Mapping[str, "Parameter"]


def trainable(backbone: Backbone, mode: Full | Lora) -> Named:
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
    named = named_trainable(transformer)
    for parameter in named.values():
        parameter.data = parameter.data.float()
    return named


def named_trainable(transformer: torch.nn.Module) -> Named:
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


def _check_rank(transformer: torch.nn.Module, rank: int, targets: tuple[str, ...]) -> None:
    """ConfigError for a rank that no module could have, before memory for it is asked for."""
    named = ((name, getattr(module, "weight", None)) for name, module in transformer.named_modules())
    found = [w for name, w in named if w is not None and f".{name}".endswith(tuple(f".{t}" for t in targets))]
    widest = max((min(w.shape[0], w[0].numel()) for w in found if w.ndim > 1), default=None)
    if widest is not None and rank > widest:
        raise ConfigError(
            f"backbone.train.rank = {rank}: the widest module that it adapts has rank {widest}; give that or less"
        )


def seeded_adapter(named: Named, seed: int) -> None:
    """Draw the adapter's random half again, keyed, so that every rank and every start has the same."""
    import torch

    from corefit.rng import generator

    for name, parameter in named.items():
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


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of sharded weights in full, on the CPU; every rank must call this."""
    sharded: Mapping[str, Any] = tensors
    return {name: t.detach().full_tensor().cpu() for name, t in sharded.items()}


@define(eq=False)
class Ema:
    """An exponential moving average of the trained weights, in float32 beside them."""

    decay: float
    average: dict[str, Tensor]

    @staticmethod
    def of(named: Named, decay: float) -> Ema:
        return Ema(decay, {name: p.detach().clone() for name, p in named.items()})

    def update(self, named: Named, skipped: Tensor) -> None:
        """average <- decay average + (1 - decay) weights unless skipped (bool []), without a sync."""
        import torch

        share = torch.where(skipped, 0.0, 1 - self.decay)
        old, new = local(self.average.values()), local(named.values())
        torch._foreach_lerp_(old, new, [share] * len(old))  # pyright: ignore[reportPrivateUsage]


def reference(backbone: Backbone, named: Named) -> Backbone:
    """The policy as it is now, frozen: the same network called with copies of the trained weights alone."""
    from torch import nn
    from torch.func import functional_call

    transformer = backbone.transformer
    start = {name: p.detach().clone() for name, p in named.items()}

    class Frozen(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if not is_sharded(transformer):
                return functional_call(transformer, start, args, kwargs)
            with _exchanged(transformer, named, start):
                return transformer(*args, **kwargs)

    frozen = copy.copy(backbone)
    frozen.transformer = Frozen()
    return frozen


@contextmanager
def _exchanged(transformer: Any, named: Named, start: Mapping[str, Tensor]) -> Generator[None]:
    """The shards of `start` in place of the model's. FSDP2 gathers parameters itself, so they cannot be passed in."""
    import torch

    mine, other = local(named.values()), local(start.values())
    kept = [t.clone() for t in mine]
    transformer.reshard()
    torch._foreach_copy_(mine, other)  # pyright: ignore[reportPrivateUsage]
    try:
        yield
    finally:
        transformer.reshard()
        torch._foreach_copy_(mine, kept)  # pyright: ignore[reportPrivateUsage]
