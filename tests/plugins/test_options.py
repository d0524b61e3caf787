"""Options of a network that change how fast it is: attention backends, regional compile."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS

from corefit.errors import ModelError
from corefit.testing import tiny_sd3
from corefit_backbones.sd3 import Sd3

CPU = torch.device("cpu")


def loaded(folder: Path, **keys: Any) -> Sd3:
    backbone = Sd3(str(folder), max_sequence_length=16, **keys)
    backbone.load(CPU, torch.float32)
    return backbone


def step(backbone: Sd3) -> dict[str, torch.Tensor]:
    """Gradients of one forward."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    backbone.velocity(
        x, torch.tensor([0.3, 0.8]), backbone.encode_text(["a red sky", "a sea"])
    ).square().mean().backward()
    return {name: p.grad for name, p in backbone.transformer.named_parameters() if p.grad is not None}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_compute_the_same_and_keep_their_names(tmp_path: Path) -> None:
    checkpoint = tiny_sd3(tmp_path / "base", words=WORDS, layers=1)
    plain, compiled = loaded(checkpoint), loaded(checkpoint, compile=True)
    expected, found = step(plain), step(compiled)
    assert expected.keys() == found.keys()
    assert all((expected[name] - found[name]).abs().max() < 1e-4 for name in expected)
    assert any(block._compiled_call_impl for block in compiled.transformer.transformer_blocks)
    for name, backbone in (("plain", plain), ("compiled", compiled)):
        backbone.save(tmp_path / name)
    one, other = (tmp_path / name / "transformer/diffusion_pytorch_model.safetensors" for name in ("plain", "compiled"))
    assert one.read_bytes() == other.read_bytes()


def test_unknown_attention_is_refused_with_what_there_is(checkpoint: Path) -> None:
    with pytest.raises(ModelError, match=r"attention = 'flesh' cannot be used.*native"):
        loaded(checkpoint, attention="flesh")


def test_another_attention_computes_the_same(checkpoint: Path) -> None:
    expected, found = step(loaded(checkpoint)), step(loaded(checkpoint, attention="_native_math"))
    assert all((expected[name] - found[name]).abs().max() < 1e-5 for name in expected)
