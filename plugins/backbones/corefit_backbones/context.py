"""A sample's sequence on several processes, a part on each: diffusers' context parallel, by its plan for a network.

Attention is Ulysses' (arXiv 2309.14509): each process has all tokens of some heads for it. diffusers' ring attention
needs what torch's own attention does not return, and its backends for any length have no backward.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from corefit.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch

PATH = "context_parallel"


def check(backbone: Any, kind: Any, number: int, sizes: Iterable[Sequence[int]]) -> None:
    """Raise ConfigError unless `number` processes can share each sample of these sizes, in pixels.

    backbone  a family of diffusers (Diffusers), and `kind` diffusers' class of its network
    """
    plan = getattr(kind, "_cp_plan", None)
    if not plan:
        raise ConfigError(
            f"diffusers has no plan by which to split a sample of {kind.__name__}; remove the key. It has one for Wan "
            "and FLUX.1"
        )
    net = backbone.checkpoint.config(backbone.networks[0])
    counts = {"attention heads": net["num_attention_heads"]}
    if "encoder_hidden_states" in plan.get("", {}):
        counts["text tokens (max_sequence_length)"] = backbone.max_sequence_length
    for size in sizes:
        counts[f"tokens of {list(size)}"] = _tokens(backbone, net, backbone.latent_shape(size))
    for what, count in counts.items():
        if count % number:
            raise ConfigError(f"the {count} {what} are no multiple of {number}; choose another number of processes")


def _tokens(backbone: Any, net: Mapping[str, Any], shape: Sequence[int]) -> int:
    """Number of tokens that the network makes of latents of `shape`, (C, ...)."""
    patch = net.get("patch_size", 1)
    if isinstance(patch, int):
        return backbone.num_tokens(shape)
    return math.prod(side // part for side, part in zip(shape[1:], patch, strict=True))


def split(transformer: Any, number: int, device: torch.device) -> None:
    """Let the network compute a part of each sample's sequence on each of `number` processes, which follow each other.

    Results are whole on all of them. The gradient of a weight is the sum of theirs; that of the input is whole.
    """
    try:
        from diffusers import ContextParallelConfig
        from diffusers.hooks.context_parallel import apply_context_parallel
        from diffusers.models._modeling_parallel import ParallelConfig
    except ImportError as error:
        raise ModelError(f"{PATH}: it needs diffusers 0.39 or newer: {error}") from error
    mesh = _mesh(device.type, number)
    # enable_parallelism would ask for a GPU
    context = ContextParallelConfig(ulysses_degree=number, mesh=mesh)
    config = ParallelConfig(context_parallel_config=context)
    config.setup(mesh.get_rank(), mesh.size(), device, mesh=mesh)
    transformer._parallel_config = config
    for module in transformer.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_parallel_config"):
            _check_attention(processor)
            processor._parallel_config = config
    apply_context_parallel(transformer, context, _plan(transformer))
    transformer.register_forward_pre_hook(
        functools.partial(_sum_gradient, mesh["ulysses"].get_group()), with_kwargs=True
    )


@functools.cache
def _mesh(kind: str, number: int) -> Any:
    """The mesh that diffusers asks for; groups of processes are made once."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    shape = (dist.get_world_size() // number, 1, number)
    return init_device_mesh(kind, shape, mesh_dim_names=("data", "ring", "ulysses"))


def _plan(transformer: Any) -> dict[str, Any]:
    """The network's plan, without the times of each token: corefit's networks are told one for each sample."""
    plan = dict(transformer._cp_plan)
    plan[""] = {name: part for name, part in plan.get("", {}).items() if name != "timestep"}
    return {name: part for name, part in plan.items() if part}


def _check_attention(processor: Any) -> None:
    """Raise ModelError for an attention backend with which diffusers cannot split samples."""
    from diffusers.models import attention_dispatch

    registry: Any = getattr(attention_dispatch, "_AttentionBackendRegistry")  # noqa: B009
    name = attention_dispatch.AttentionBackendName(processor._attention_backend or "native")
    if not registry._is_context_parallel_available(name):
        raise ModelError(f"{PATH}: attention = {name.value!r} does not split samples; remove one of the two keys")


def _sum_gradient(group: Any, _: Any, args: tuple[Any, ...], keys: dict[str, Any]) -> Any:
    """Make the gradient of the network's input whole: of each part of the sequence, a process has its own alone."""
    x = keys.get("hidden_states", args[0] if args else None)
    if x is None or not x.requires_grad:
        return None
    whole = _summed(x, group)
    return (args, {**keys, "hidden_states": whole}) if "hidden_states" in keys else ((whole, *args[1:]), keys)


def _summed(x: Any, group: Any) -> Any:
    """x itself, whose gradient is the sum over a group of processes."""
    import torch
    import torch.distributed as dist

    class Summed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *grad_outputs: torch.Tensor) -> torch.Tensor:
            total = grad_outputs[0].clone(memory_format=torch.contiguous_format)
            dist.all_reduce(total, group=group)
            return total

    return Summed.apply(x)
