"""Options of a network that change how fast it is: checkpointing, attention backends, regional compile."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS

from corefit.errors import ModelError
from corefit.testing import tiny_chroma, tiny_flux, tiny_sd3, tiny_wan
from corefit.train import weights
from corefit.types.stage import Lora
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
compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")


def loaded(folder: Path, kind: type[Any] = Sd3, **keys: Any) -> Any:
    backbone = kind(str(folder), max_sequence_length=16, **keys)
    backbone.load(CPU, torch.float32)
    return backbone


def adapted(backbone: Any) -> Any:
    """With a LoRA that does something."""
    for name, p in weights.make_trainable(backbone, Lora(rank=2)).items():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return backbone


def velocity(backbone: Any, rows: int, prompts: list[str] | None = None) -> torch.Tensor:
    shape = backbone.latent_shape([32, 32])
    x = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0))
    cond = backbone.encode_text(prompts or ["a red sky", "a sea", "a"][:rows])
    return backbone.velocity(x, torch.linspace(0.3, 0.8, rows), cond)


def step(backbone: Any) -> dict[str, torch.Tensor]:
    """Gradients of one forward."""
    velocity(backbone, 2).square().mean().backward()
    return {name: p.grad for name, p in backbone.transformer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, compiler])])
def test_compiled_blocks_compute_the_same_and_keep_their_names(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compiled and kept does not depend on the backend, of which "inductor" writes and compiles C++."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
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


@pytest.mark.slow
@compiler
def test_a_compiled_network_takes_other_numbers_of_rows_with_and_without_gradient(tmp_path: Path) -> None:
    checkpoint = tiny_sd3(tmp_path / "base", words=WORDS, layers=1)
    plain, compiled = (adapted(loaded(checkpoint, gradient_checkpointing=on, compile=on)) for on in (False, True))
    for rows in (2, 3, 1):
        expected, found = (velocity(backbone, rows) for backbone in (plain, compiled))
        assert (expected - found).abs().max() < 1e-4
        with torch.no_grad():
            assert (velocity(compiled, rows) - expected).abs().max() < 1e-4
    expected, found = step(plain), step(compiled)
    assert expected.keys() == found.keys()
    assert all(".lora_" in name for name in found)
    assert all((expected[name] - found[name]).abs().max() < 1e-4 for name in expected)


def test_another_bucket_or_number_of_rows_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a forward without a graph is compiled anew, and one row.

    With a graph for each shape, two kinds of block would be at torch's own limit after three numbers of rows, and what
    samples would never be compiled.
    """
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **keys: real(block, backend=backend, **keys))
    torch._dynamo.reset()
    backbone = loaded(tiny_sd3(tmp_path / "base", words=WORDS, layers=1), compile=True)
    cond = backbone.encode_text(["a red sky"])
    found: dict[tuple[bool, int], list[int]] = {}
    for graph in (True, False):
        for rows in (2, 3):
            for size in ([32, 32], [48, 32], [32, 64]):
                before = len(graphs)
                with torch.set_grad_enabled(graph):
                    x = torch.zeros(rows, *backbone.latent_shape(size))
                    backbone.velocity(x, torch.full((rows,), 0.5), cond.repeat(rows))
                found.setdefault((graph, rows), []).append(len(graphs) - before)
    torch._dynamo.reset()
    assert {key for key, number in found.items() if any(number)} == {(True, 2), (False, 2)}
    assert all(sum(number) <= 2 and not number[2] for number in found.values())
    assert torch._dynamo.config.recompile_limit >= 3 * len(graphs)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_computes_the_same_bits(family: str, tmp_path: Path) -> None:
    """With prompts shorter than their number of tokens: a mask that is lost would show."""
    make, kind = FAMILIES[family]
    checkpoint = make(tmp_path / "base", words=WORDS)
    plain, less = (loaded(checkpoint, kind, gradient_checkpointing=on) for on in (False, True))
    expected, found = step(plain), step(less)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("between", [["a sea", "a sea"], ["a red sky " * 4] * 2])
def test_a_forward_before_backward_does_not_change_what_is_recomputed(between: list[str], tmp_path: Path) -> None:
    checkpoint = tiny_chroma(tmp_path / "base", words=WORDS)
    gradients: list[dict[str, torch.Tensor]] = []
    for on in (False, True):
        backbone = loaded(checkpoint, Chroma, gradient_checkpointing=on)
        v = velocity(backbone, 2)
        with torch.no_grad():
            velocity(backbone, 2, between)
        v.square().mean().backward()
        gradients.append({name: p.grad for name, p in backbone.transformer.named_parameters() if p.grad is not None})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize(
    ("attention", "said"),
    [
        ("flesh", r"attention = 'flesh' is not one of .*native.*\(did you mean 'flash'\?\)"),
        ("sage", r"attention = 'sage' cannot train: it has no backward"),
        ("_sage_qk_int8_pv_fp16_triton", r"cannot train"),
        ("flash", r"attention = 'flash' cannot be used here: .*flash-attn"),
    ],
)
def test_attention_that_cannot_be_is_refused_before_weights_are_read(attention: str, said: str, tmp_path: Path) -> None:
    checkpoint = tiny_flux(tmp_path / "base", words=WORDS)
    for file in (checkpoint / "transformer").glob("*.safetensors"):
        file.write_bytes(b"never read")
    with pytest.raises(ModelError, match=said):
        Flux(str(checkpoint), attention=attention).load_blank(torch.float32)


def test_attention_that_a_family_would_not_hear_of_is_refused(checkpoint: Path) -> None:
    with pytest.raises(
        ModelError, match=r"attention = '_native_math' would have no effect: diffusers computes this family"
    ):
        loaded(checkpoint, attention="_native_math")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "sd3"])
def test_another_attention_is_used_by_this_network_alone(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    make, kind = FAMILIES[family]
    checkpoint, called = make(tmp_path / "base", words=WORDS), list[str]()
    backends: Any = _AttentionBackendRegistry._backends
    for name in (AttentionBackendName.NATIVE, AttentionBackendName._NATIVE_MATH):
        monkeypatch.setitem(backends, name, noting(called, name.value, backends[name]))
    other, usual = loaded(checkpoint, kind, attention="_native_math"), loaded(checkpoint, kind)
    found = step(other)
    assert set(called) == {"_native_math"}
    called.clear()
    expected = step(usual)
    assert set(called) == {"native"}
    assert all((expected[name] - found[name]).abs().max() < 1e-5 for name in expected)


def noting(called: list[str], name: str, backend: Any) -> Any:
    def noted(*args: Any, **keys: Any) -> Any:
        called.append(name)
        return backend(*args, **keys)

    return noted
