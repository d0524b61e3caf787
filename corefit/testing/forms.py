"""Checks of a backbone in the two forms that training uses: the network in bfloat16, and with a LoRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from corefit.testing.checks import close, expect
from corefit.types import Backbone, Condition

if TYPE_CHECKING:
    from torch import Tensor

ROUNDED = 0.05
"""bfloat16 may change the velocity of a network of a few layers by this share of its norm."""
SAME = 1e-4
"""The tolerance for float32 arithmetic."""
RANK, ALPHA = 2, 6.0
"""They differ, because a lost scale alpha / rank would not show if it were 1."""


def check_half(backbone: Backbone, x: Tensor, cond: Condition, sigma: Tensor, v: Tensor) -> None:
    """Raise AssertionError unless the network gives the same velocity in bfloat16, up to rounding.

    backbone  not loaded
    v         the velocity at (x, sigma) of the same weights in float32
    """
    import torch

    backbone.load(torch.device("cpu"), torch.bfloat16)
    dtypes = {p.dtype for p in backbone.transformer.parameters()}
    expect(torch.bfloat16 in dtypes, "load in bfloat16 leaves no parameter of `transformer` in it")
    half = backbone.velocity(x, sigma, cond)
    expect(half.dtype == torch.float32, f"velocity of a network in bfloat16 is {half.dtype}; return float32")
    error = float((half - v).norm() / v.norm())
    expect(
        error <= ROUNDED,
        f"velocity of a network in bfloat16 differs from float32's by {error:.2g} of its norm: pass the network its "
        "timestep in float32 (997.1 becomes 996 in bfloat16)",
    )


def check_lora(from_saved: Callable[[], Backbone], folder: Path, x: Tensor, cond: Condition, sigma: Tensor) -> None:
    """Raise AssertionError unless `load_lora` reads a LoRA that `save` wrote, unchanged and trainable.

    Nothing is checked if the network refuses every adapter.

    from_saved  makes the backbone, not loaded
    folder      the folder for the LoRA, which does not exist yet
    """
    adapted = _loaded(from_saved())
    if not _adapt(adapted):
        return
    v = adapted.velocity(x, sigma, cond)
    folder.mkdir()
    adapted.save(folder)
    again = _loaded(from_saved())
    plain = again.velocity(x, sigma, cond)
    expect(not close(plain, v, SAME), "a LoRA on lora_targets does not change velocity: call `transformer` itself")
    again.load_lora(folder)
    expect(close(again.velocity(x, sigma, cond), v, SAME), "velocity after load_lora is not that of the LoRA saved")
    training = [name for name, p in again.transformer.named_parameters() if p.requires_grad]
    expect(
        bool(training) and all("lora_" in name for name in training),
        f"after load_lora {len(training)} parameters require a gradient; the LoRA's must, and no others",
    )


def _loaded(backbone: Backbone) -> Backbone:
    import torch

    backbone.load(torch.device("cpu"), torch.float32)
    return backbone


def _adapt(backbone: Backbone) -> bool:
    """Add a LoRA with random weights, which changes the output; return False if the network takes none."""
    import torch
    from peft import LoraConfig

    network, targets = backbone.transformer, list(backbone.lora_targets)
    named = [n for n, _ in network.named_modules() if f".{n}".endswith(tuple(f".{target}" for target in targets))]
    expect(bool(named), f"lora_targets {targets} name no module of `transformer`")
    network.requires_grad_(False)
    try:
        network.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))  # pyright: ignore[reportArgumentType]
    except ValueError:
        return False
    draw = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw) / 4
    return True
