"""Blocks whose weights wait in main memory: equal results, gradients and all, and few weights on the device at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS

from corefit.system import memory
from corefit.testing import tiny_chroma, tiny_flux, tiny_sd3, tiny_wan
from corefit.train import weights
from corefit.types.stage import Lora
from corefit_backbones import offloading
from corefit_backbones.backbone import Diffusers
from corefit_backbones.chroma import Chroma
from corefit_backbones.flux import Flux
from corefit_backbones.sd3 import Sd3
from corefit_backbones.wan import Wan

CPU = torch.device("cpu")
FAMILIES: dict[str, tuple[Callable[..., Path], type[Diffusers]]] = {
    "sd3": (tiny_sd3, Sd3),
    "flux": (tiny_flux, Flux),
    "chroma": (tiny_chroma, Chroma),
    "wan": (tiny_wan, Wan),
}


def adapted(folder: Path, kind: type[Any] = Sd3, settle: bool = True, **keys: Any) -> Any:
    """A backbone with a LoRA that does something; where it offloads, its blocks wait."""
    backbone = kind(str(folder), max_sequence_length=16, **keys)
    backbone.load(CPU, torch.float32)
    for name, p in weights.make_trainable(backbone, Lora(rank=2)).items():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    if backbone.offloads and settle:
        backbone.settle(CPU)
    return backbone


def inputs(backbone: Any, rows: int = 2) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, *backbone.latent_shape([32, 32]), generator=generator)
    shapes = backbone.condition_shapes().items()
    cond = {name: torch.randn(rows, *shape, generator=generator) for name, shape in shapes}
    return x, torch.linspace(0.3, 0.8, rows), weights_condition(cond)


def weights_condition(tensors: dict[str, torch.Tensor]) -> Any:
    from corefit import Condition

    return Condition(tensors)


def gradients(backbone: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in backbone.transformer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_results_and_gradients_are_equal_to_the_bit(family: str, tmp_path: Path) -> None:
    make, kind = FAMILIES[family]
    folder = make(tmp_path / "base", words=WORDS, layers=2)
    plain, waiting = (adapted(folder, kind, offload=each, gradient_checkpointing=True) for each in ("none", "blocks"))
    for _ in range(2):
        found = [backbone.velocity(*inputs(backbone)) for backbone in (plain, waiting)]
        assert torch.equal(*found)
        for v in found:
            v.square().mean().backward()
    expected, got = gradients(plain), gradients(waiting)
    assert expected
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_two_blocks_are_on_the_device_at_once(family: str, tmp_path: Path) -> None:
    make, kind = FAMILIES[family]
    folder = make(tmp_path / "base", words=WORDS, layers=6)
    waiting = adapted(folder, kind, offload="blocks")
    network = waiting.transformer
    blocks = [sum(t.nbytes for _, _, t in offloading._frozen(b)) for b in offloading.blocks_of(network)]
    ready = inputs(waiting)
    seen: list[int] = []
    real = torch.Tensor.clone
    with torch.no_grad(), memory.track_live_bytes() as held:
        waiting.velocity(*ready)
    print(family, blocks, held.peak, held.now)
    plain = adapted(folder, kind, gradient_checkpointing=True)
    for b in (plain, waiting):
        with memory.track_live_bytes() as held:
            v = b.velocity(*ready)
            kept = held.now
            v.square().mean().backward()
        print(family, kept, held.peak, held.now)
