"""Fake tensors, which have a shape and no memory: networks made of them tell what real ones would hold."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")


def faked(run: Callable[[], T]) -> T | None:
    """Return what `run` returns on fake tensors; None where that needs their values.

    They are of the CPU: its kernels keep what a GPU's keep, while attention on the meta device would keep its matrix.
    """
    from torch._subclasses import fake_tensor

    with fake_tensor.FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kernels that are slower, which is no matter of what they hold
        try:
            return run()
        except (
            fake_tensor.DynamicOutputShapeException,
            fake_tensor.DataDependentOutputException,
            fake_tensor.UnsupportedOperatorException,
        ):
            return None


def materialize(network: nn.Module) -> None:
    """Replace tensors on the meta device by fake ones, with gradients, to which backward then adds in place."""
    import torch
    from torch import nn

    for module in network.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            made = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
            made.grad = torch.empty_like(made) if p.requires_grad else None
            setattr(module, name, made)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        for name, value in list(vars(module).items()):  # tables that are no buffers, as some networks of diffusers have
            if isinstance(value, torch.Tensor):
                setattr(module, name, torch.empty(value.shape, dtype=value.dtype))
