"""Blocks whose weights wait in main memory: equal results, gradients and all, and few weights on the device at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS

from corefit import Condition
from corefit.errors import ConfigError
from corefit.pipeline import read
from corefit.system import memory
from corefit.system.ranks import join
from corefit.testing import tiny_chroma, tiny_flux, tiny_sd3, tiny_wan
from corefit.train import weights
from corefit.types.stage import Lora
from corefit_backbones import offloading
from corefit_backbones.chroma import Chroma
from corefit_backbones.flux import Flux
from corefit_backbones.sd3 import Sd3
from corefit_backbones.wan import Wan

CPU, DEVICE = torch.device("cpu"), torch.device("meta")
"""DEVICE stands for a GPU: torch refuses to compute with tensors of both."""
FAMILIES: dict[str, tuple[Callable[..., Path], type[Any], dict[str, Any]]] = {
    "sd3": (tiny_sd3, Sd3, {"layers": 3}),
    "flux in 8 bits": (tiny_flux, Flux, {"layers": 2, "single_layers": 2}),
    "chroma": (tiny_chroma, Chroma, {}),
    "wan 2.2 A14B": (tiny_wan, Wan, {"layers": 2, "experts": 2}),
}


def adapted(family: str, folder: Path, **keys: Any) -> Any:
    """A backbone on the CPU with a LoRA that does something."""
    make, kind, shape = FAMILIES[family]
    base = folder if folder.exists() else make(folder, words=WORDS, **shape)
    bits = {"frozen": "int8"} if "8 bits" in family else {}
    backbone = kind(str(base), max_sequence_length=16, **bits, **keys)
    backbone.load(CPU, torch.float32)
    for name, p in weights.make_trainable(backbone, Lora(rank=2)).items():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return backbone


def velocity(backbone: Any, device: torch.device = CPU) -> torch.Tensor:
    """Of one noisy and one nearly clean row, so that each of two experts has one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *backbone.latent_shape([32, 32]), generator=generator)
    cond = {name: torch.randn(2, *s, generator=generator) for name, s in backbone.condition_shapes().items()}
    return backbone.velocity(x.to(device), torch.tensor([0.95, 0.3]).to(device), Condition(cond).to(device))


def gradients(backbone: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in backbone.transformer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_results_and_gradients_are_equal_to_the_bit(family: str, tmp_path: Path) -> None:
    plain = adapted(family, tmp_path / "base", gradient_checkpointing=True)
    waiting = adapted(family, tmp_path / "base", offload="blocks")
    waiting.settle(CPU)
    for _ in range(2):  # the second time, the first block is there already
        found = [velocity(backbone) for backbone in (plain, waiting)]
        assert torch.equal(*found)
        for v in found:
            v.square().mean().backward()
    expected, got = gradients(plain), gradients(waiting)
    assert expected
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    with torch.no_grad():
        assert torch.equal(velocity(plain), velocity(waiting))
    assert sorted(plain.transformer.state_dict()) == sorted(waiting.transformer.state_dict())


def test_weights_of_two_blocks_are_on_the_device_at_once_in_backward_too(tmp_path: Path) -> None:
    plain = adapted("sd3", tmp_path / "base", gradient_checkpointing=True)
    waiting = adapted("sd3", tmp_path / "base", offload="blocks")
    everything = sum(t.nbytes for t in (*waiting.transformer.parameters(), *waiting.transformer.buffers()))
    resident = waiting.resident_bytes()
    waiting.settle(CPU)
    assert waiting.resident_bytes() == resident
    named = dict(waiting.transformer.named_parameters())
    staying = everything - sum(named[name].nbytes for name in offloading.waiting(waiting.transformer))
    for graph in (False, True):
        peaks: list[int] = []
        for backbone in (plain, waiting):
            with torch.set_grad_enabled(graph), memory.track_live_bytes() as held:
                v = velocity(backbone)
                if graph:
                    v.square().mean().backward()
                del v
            peaks.append(held.peak)
        fetched = resident - staying
        assert 0 < peaks[1] - peaks[0] <= fetched
        assert peaks[1] - peaks[0] > 0.9 * fetched
        assert fetched < 0.8 * (everything - staying)


@pytest.mark.parametrize("family", ["sd3", "wan 2.2 A14B"])
def test_all_that_computes_is_on_the_device_and_the_rest_waits(family: str, tmp_path: Path) -> None:
    backbone = adapted(family, tmp_path / "base", offload="blocks")
    backbone.settle(DEVICE)
    network, waiting = backbone.transformer, set(backbone.transformer._ddp_params_and_buffers_to_ignore)

    def places() -> dict[str, set[str]]:
        found: dict[str, set[str]] = {"cpu": set(), "meta": set()}
        for name, p in network.named_parameters():
            found[p.device.type].add(name)
        return found

    before = places()
    assert before["cpu"] == waiting
    assert all("blocks." in name and "lora" not in name for name in waiting)
    assert {name for name, p in network.named_parameters() if p.requires_grad} <= before["meta"]
    for part in network.modules():  # of real experts each gets its row; values of fake ones cannot be asked
        if hasattr(part, "_rows"):
            part._rows = lambda high: ([1, 1], [1, 1])
    v = velocity(backbone, DEVICE)
    v.square().mean().backward()
    assert {p.grad.device.type for p in network.parameters() if p.requires_grad} == {"meta"}
    assert places() == before


def test_weights_wait_again_after_a_failure(tmp_path: Path) -> None:
    backbone = adapted("sd3", tmp_path / "base", offload="blocks")
    backbone.settle(CPU)
    expected, block = velocity(backbone), backbone.transformer.transformer_blocks[1]
    former = {name: p.data_ptr() for name, p in block.named_parameters()}
    handle = block.attn.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        velocity(backbone)
    assert {name: p.data_ptr() for name, p in block.named_parameters()} == former
    handle.remove()
    assert torch.equal(velocity(backbone), expected)


def test_the_trainer_lets_blocks_wait_and_moves_them_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_sd3(tmp_path / "base", words=WORDS, layers=2)
    ranks, seen = join("fp32"), list[Any]()
    monkeypatch.setattr(ranks.accelerator, "prepare_model", lambda model, place=None, **_: seen.append(place) or model)
    for offload in ("blocks", "none"):
        backbone = Sd3(str(folder), max_sequence_length=16, offload=offload)  # type: ignore[arg-type]
        trained = weights.load(backbone, ranks, frozen_in_bf16=False, mode=Lora(rank=2))
        weights.prepare(backbone, ranks, evaluation=False)
        hooks = [len(block._forward_pre_hooks) for block in backbone.transformer.transformer_blocks]
        assert hooks == [1 if offload == "blocks" else 0] * 2
        assert all(".lora_" in name for name in trained)
    assert seen == [False, None]


@pytest.mark.slow
def test_compiled_blocks_wait_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = torch.compile

    def compile_eagerly(self: torch.nn.Module, **settings: bool) -> None:  # so that no C++ compiler is needed
        self._compiled_call_impl = compiler(self._call_impl, backend="eager", **settings)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    torch._dynamo.utils.counters.clear()
    plain = adapted("sd3", tmp_path / "base", gradient_checkpointing=True)
    waiting = adapted("sd3", tmp_path / "base", offload="blocks", compile=True)
    waiting.settle(CPU)
    for backbone in (plain, waiting):
        velocity(backbone).square().mean().backward()
    expected, got = gradients(plain), gradients(waiting)
    assert all((expected[name] - got[name]).abs().max() < 1e-6 for name in expected)
    assert not torch._dynamo.utils.counters["graph_break"]


FILE = """
name = "waits"
shard = {shard}
backbone = {{ use = "sd3", path = "base", offload = "blocks", train = {{ use = "{mode}" }} }}
data = {{ source = {{ use = "imagefolder", path = "." }}, size = [32, 32] }}
[[stage]]
name = "soar"
objective = {{ use = "soar" }}
steps = 1
batch = 1
"""


@pytest.mark.parametrize(
    ("mode", "shard", "expected"),
    [
        ("full", "false", r"stage.soar.train: .* train a LoRA, or remove 'offload'"),
        ("lora", "true", r"shard: sharded weights cannot wait"),
    ],
)
def test_check_refuses_where_weights_cannot_wait(mode: str, shard: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "pipeline.toml").write_text(FILE.format(mode=mode, shard=shard))
    with pytest.raises(ConfigError, match=expected):
        read(tmp_path / "pipeline.toml")
