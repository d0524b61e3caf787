"""A frozen base in fewer bits: which layers, what they compute, what is kept, and a LoRA that trains on it."""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from attrs import frozen
from conftest import WORDS, Project
from diffusers.hooks import apply_layerwise_casting
from processes import as_one, settings, two
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from corefit import Batch, Condition, Context
from corefit.errors import ModelError
from corefit.rng import Rng
from corefit.rollout.noise import LogitNormal
from corefit.rollout.samplers import FlowSde
from corefit.system import memory
from corefit.testing import tiny_chroma, tiny_flux, tiny_sd3, tiny_wan
from corefit.train import weights
from corefit.types import ModelPath, Reward, Weighted
from corefit.types.stage import Lora
from corefit_backbones import lowbit
from corefit_backbones.chroma import Chroma
from corefit_backbones.flux import Flux
from corefit_backbones.sd3 import Sd3
from corefit_backbones.wan import Wan
from corefit_flow_grpo import FlowGrpo

CPU, BITS = torch.device("cpu"), ("fp8", "int8", "nf4")
FAMILIES: dict[str, tuple[Callable[..., Path], type[Any], dict[str, Any]]] = {
    "sd3": (tiny_sd3, Sd3, {}),
    "flux": (tiny_flux, Flux, {}),
    "chroma": (tiny_chroma, Chroma, {}),
    "wan": (tiny_wan, Wan, {}),
    "wan 2.2 A14B": (tiny_wan, Wan, {"experts": 2}),
}
LORA = "backbone.train={use='lora', rank=2}"


@frozen
class Bright(Reward):
    """Mean of all pixels."""

    def score(self, media: Tensor, prompts: Any, meta: Any) -> Tensor:
        return media.flatten(1).mean(1)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: make(folder / name.split()[-1], words=WORDS, **keys) for name, (make, _, keys) in FAMILIES.items()}


def loaded(folder: Path, kind: type[Any] = Sd3, dtype: torch.dtype = torch.float32, **keys: Any) -> Any:
    backbone = kind(str(folder), max_sequence_length=8, **keys)
    backbone.load(CPU, dtype)
    return backbone


def adapted(backbone: Any) -> Any:
    """With a LoRA that does something."""
    for name, p in weights.make_trainable(backbone, Lora(rank=2)).items():
        nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return backbone


def velocity(backbone: Any) -> Tensor:
    """For conditions that look like text; encoders would take most of the time."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, *backbone.latent_shape([16, 16]), generator=draw)
    shapes = backbone.condition_shapes().items()
    cond = Condition({n: torch.randn(2, *s, generator=draw) if n != "mask" else torch.ones(2, *s) for n, s in shapes})
    return backbone.velocity(x, torch.tensor([0.3, 0.95]), cond)


def step(backbone: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The velocity, and the gradients of its square."""
    v = velocity(backbone)
    v.square().mean().backward()
    return v.detach(), {name: p.grad for name, p in backbone.transformer.named_parameters() if p.grad is not None}


def unpacked(layer: lowbit.LowBitLinear, dtype: torch.dtype) -> Tensor:
    return lowbit.unpack(layer.weight, layer.scale, layer.in_features, layer.bits, dtype)


def rounded(backbone: Any) -> Any:
    """Plain layers whose weights are what the packed ones stand for."""
    for name, layer in list(lowbit.layers(backbone.transformer)):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight, plain.bias = nn.Parameter(unpacked(layer, torch.float32), requires_grad=False), layer.bias
        owner, _, own = name.rpartition(".")
        setattr(backbone.transformer.get_submodule(owner), own, plain)
    return backbone


# ---- layers


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_of_every_family_train_a_lora_as_plain_layers_with_rounded_weights_would(
    family: str, bases: dict[str, Path]
) -> None:
    folder, kind = bases[family], FAMILIES[family][1]
    exact = velocity(loaded(folder, kind)).detach()
    names: list[set[str]] = []
    for bits in BITS:
        backbone = loaded(folder, kind, frozen=bits)
        names.append({name for name, _ in lowbit.layers(backbone.transformer)})
        assert 0 < float((velocity(backbone) - exact).norm() / exact.norm()) < 0.05
        found, gradients = step(adapted(backbone))
        expected, wanted = step(adapted(rounded(loaded(folder, kind, frozen=bits))))
        assert torch.equal(found, expected)
        assert gradients.keys() == wanted.keys()
        assert len(gradients) > 10
        assert all(torch.equal(gradients[name], wanted[name]) for name in wanted)
    assert names[0] == names[1] == names[2]
    blocks = ("transformer_blocks.", "single_transformer_blocks.", "blocks.")
    places = [name.removeprefix("transformer_2.").removeprefix("transformer.") for name in names[0]]
    assert all(place.startswith(blocks) and "norm" not in place for place in places)
    assert {"to_q", "proj"} <= {place.rpartition(".")[2] for place in places}


def test_everything_but_these_layers_stays_as_it_is(bases: dict[str, Path]) -> None:
    plain, packed = (loaded(bases["sd3"], frozen=bits).transformer for bits in (None, "nf4"))
    names = {name for name, _ in lowbit.layers(packed)}
    others = {n: t for n, t in plain.state_dict().items() if n.removesuffix(".weight") not in names}
    assert {"proj_out.weight", "context_embedder.weight", "transformer_blocks.0.norm1.linear.weight"} <= others.keys()
    assert {"pos_embed.pos_embed", "transformer_blocks.0.attn.to_q.bias"} <= others.keys()
    state = packed.state_dict()
    assert all(torch.equal(state[name], t) and state[name].dtype == t.dtype for name, t in others.items())


@pytest.mark.parametrize("bits", ["bf16", *BITS])
def test_a_blank_network_has_the_bytes_of_the_loaded_one(bits: str, bases: dict[str, Path]) -> None:
    kind: Any = Sd3
    backbone, blank = (kind(str(bases["sd3"]), frozen=bits, max_sequence_length=8) for _ in range(2))
    backbone.load(CPU, torch.float32)
    blank.load_blank(torch.float32)
    one, other = (
        {name: (p.shape, p.dtype) for name, p in each.transformer.named_parameters()} for each in (backbone, blank)
    )
    assert one == other
    held = {"bf16": 2, "fp8": 1, "int8": 1, "nf4": 0.5}[bits]
    for _, layer in lowbit.layers(backbone.transformer):
        filled = -(-layer.in_features // 64) * 64 if bits == "nf4" else layer.in_features
        assert layer.weight.nbytes == held * layer.out_features * filled


def test_bf16_is_what_the_precision_bf16_holds_anyway(bases: dict[str, Path]) -> None:
    plain, packed = (adapted(loaded(bases["sd3"], dtype=torch.bfloat16, frozen=bits)) for bits in (None, "bf16"))
    (v, one), (w, other) = step(plain), step(packed)
    assert torch.equal(v, w)
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---- formats


def weight(rows: int = 6, columns: int = 192) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 0, rows)[:, None]


def as_bytes(t: Tensor) -> Tensor:
    """What can be compared: bytes that are held as bfloat16 may be no number."""
    return t.view({torch.bfloat16: torch.int16, torch.float32: torch.int32}[t.dtype])


def roundtrip(w: Tensor, bits: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    packed = lowbit.pack(w, bits)
    return lowbit.unpack(packed["weight"], packed.get("scale"), w.shape[1], bits, dtype)


def test_fp8_is_what_layerwise_casting_of_diffusers_stores() -> None:
    w, layer = weight().bfloat16(), nn.Linear(192, 6, bias=False, dtype=torch.bfloat16)
    layer.weight.data = w.clone()
    apply_layerwise_casting(layer, torch.float8_e4m3fn, torch.bfloat16, skip_modules_pattern=("none",))
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(roundtrip(w, "fp8"), layer(torch.eye(192, dtype=torch.bfloat16)).T)


def test_int8_is_that_of_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    w = weight()
    layer = nn.Linear(192, 6, bias=False)
    layer.weight.data = w.clone()
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    assert torch.equal(roundtrip(w, "int8", torch.float32), layer.weight.dequantize())


def test_nf4_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = weight().bfloat16()
    expected = functional.dequantize_4bit(*functional.quantize_4bit(w, blocksize=64, quant_type="nf4"))
    assert torch.equal(roundtrip(w, "nf4"), expected)


@pytest.mark.parametrize("bits", ["bf16", *BITS])
@pytest.mark.parametrize("columns", [192, 33])
def test_a_row_is_packed_by_itself_so_that_shards_can_be_read(bits: str, columns: int) -> None:
    w = weight(columns=columns)
    w[3] = 0
    whole = lowbit.pack(w, bits)
    shapes = lowbit.shapes(6, columns, bits)
    assert {name: (tuple(t.shape), t.dtype) for name, t in whole.items()} == dict(shapes)
    for rows in (slice(2, 5), slice(4, 4)):
        part = lowbit.pack(w[rows], bits)
        assert all(torch.equal(as_bytes(part[name]), as_bytes(t[rows])) for name, t in whole.items())
    back = roundtrip(w, bits, torch.float32)
    assert back.shape == w.shape
    assert (back[3] == 0).all()


@pytest.mark.parametrize("bits", BITS)
def test_backward_keeps_no_weight_but_the_packed_one(bits: str) -> None:
    """Layerwise casting keeps each weight in its dtype of computation, and all of them at the end of a forward."""
    layer = lowbit.LowBitLinear(nn.Linear(192, 64), bits)
    for name, t in lowbit.pack(weight(64), bits).items():
        getattr(layer, name).data = t
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(2, 192, requires_grad=True))
    assert kept
    assert {t.data_ptr() for t in kept} <= {p.data_ptr() for p in layer.parameters()}


def test_under_autocast_the_product_is_in_its_dtype(bases: dict[str, Path]) -> None:
    layer = next(layer for _, layer in lowbit.layers(loaded(bases["sd3"], frozen="int8").transformer))
    x = torch.randn(3, layer.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
        expected = nn.functional.linear(x, unpacked(layer, torch.bfloat16), layer.bias)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
@pytest.mark.parametrize("bits", BITS)
def test_a_gpu_packs_and_multiplies_as_the_cpu_does(bits: str) -> None:
    w, x = weight(64, 320).bfloat16(), torch.randn(5, 320, dtype=torch.bfloat16)
    products: list[Tensor] = []
    for device in ("cpu", "cuda"):
        layer = lowbit.LowBitLinear(nn.Linear(320, 64, device=device, dtype=torch.bfloat16), bits)
        layer.bias.data.zero_()
        for name, t in lowbit.pack(w.to(device), bits).items():
            getattr(layer, name).data = t
        found = layer(x.to(device))
        assert torch.equal(found, nn.functional.linear(x.to(device), unpacked(layer, torch.bfloat16), layer.bias))
        products.append(found.detach().float().cpu())
    torch.testing.assert_close(*products, rtol=0.02, atol=0.02 * float(products[0].abs().max()))


# ---- reading


def test_one_tensor_at_a_time_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the device nor main memory holds the network as it is in the files."""
    folder = tiny_sd3(tmp_path / "base", words=WORDS, layers=8)
    held = memory.LiveBytes()
    plain = lowbit.fill

    def fill(*args: Any) -> None:
        nonlocal held
        with memory.track_live_bytes() as held:
            plain(*args)

    monkeypatch.setattr(lowbit, "fill", fill)  # before it, all tensors are on the meta device
    backbone = loaded(folder, frozen="int8")
    state = backbone.transformer.state_dict().values()
    (file,) = (folder / "transformer").glob("*.safetensors")
    with safe_open(file, "pt") as stored:
        sizes = [stored.get_tensor(name).nbytes for name in stored.keys()]  # noqa: SIM118
    packed = sum(t.nbytes for t in state)
    assert packed + 6 * max(sizes) < 0.8 * sum(sizes), "this network is too small to show anything"
    assert held.peak < packed + 6 * max(sizes)


def test_files_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tiny_sd3(tmp_path / "base", words=WORDS, layers=1)
    (file,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["transformer_blocks.0.attn.to_q.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack transformer_blocks\.0\.attn\.to_q\.weight"):
        loaded(folder, frozen="fp8")


def test_nf4_says_which_package_it_lacks(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, found = builtins.__import__, "corefit_backbones.network.find_spec"

    def without(name: str, *args: Any, **keys: Any) -> Any:
        if name == "bitsandbytes":
            raise ImportError(name)
        return plain(name, *args, **keys)

    backbone = Sd3(ModelPath(str(bases["sd3"])), frozen="nf4")
    monkeypatch.setattr(found, lambda name: None)
    monkeypatch.setattr(builtins, "__import__", without)
    for call in (backbone.check, lambda: backbone.load(CPU, torch.float32)):
        with pytest.raises(ModelError, match=r"bitsandbytes: pip install 'corefit\[lowbit\]'"):
            call()


def test_the_largest_rank_is_that_of_the_whole_weight(bases: dict[str, Path]) -> None:
    backbone = loaded(bases["sd3"], frozen="nf4")
    layer = next(layer for _, layer in lowbit.layers(backbone.transformer))
    assert layer.in_features > layer.weight.shape[1]
    weights.make_trainable(backbone, Lora(rank=layer.in_features))


# ---- training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_the_ratio_is_exactly_1_before_the_first_update(bits: str, dtype: torch.dtype, bases: dict[str, Path]) -> None:
    backbone = adapted(loaded(bases["sd3"], dtype=dtype, frozen=bits))
    objective, prompts = FlowGrpo(group=2, steps=3, guidance=1.0), ["a red sky"] * 2
    batch = Batch(None, backbone.encode_text(prompts), prompts, [{}] * 2, [0, 1], backbone.latent_shape([16, 16]))

    rewards: list[Weighted[Reward]] = [Weighted("bright", Bright())]

    def context() -> Context:
        return Context(backbone, FlowSde(0.7), LogitNormal(), Rng((0,), [0, 1]), rewards)

    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        (part,) = objective.experience(batch, context())
        for term in objective.terms(part, context()):
            assert torch.equal(term.metrics["approx_kl"], torch.zeros(2))


def test_packed_blocks_may_wait_in_main_memory(bases: dict[str, Path]) -> None:
    here, waiting = (adapted(loaded(bases["flux"], Flux, frozen="int8", offload=o)) for o in ("none", "blocks"))
    waiting.settle(CPU)
    (v, one), (w, other) = step(here), step(waiting)
    assert torch.equal(v, w)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_trains_evaluates_and_hands_on_the_same_network(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two stages with one LoRA: what it leaves goes on the base as it is in the files, in diffusers and in corefit."""
    networks: list[set[str]] = []
    plain = weights.load

    def seen(backbone: Any, *args: Any, **keys: Any) -> Any:
        found = plain(backbone, *args, **keys)
        networks.append({layer.bits for _, layer in lowbit.layers(backbone.transformer)})
        return found

    monkeypatch.setattr(weights, "load", seen)
    keys = [word for key in (LORA, "backbone.frozen='nf4'", "stage.grpo.log_every=1") for word in ("--set", key)]
    done = project.main("run", "pipeline.toml", *keys)
    assert done.status == 0, done.err
    assert networks == [{"nf4"}] * 5, "base, each stage and each evaluation"
    run = project.folder / "runs" / "tiny"
    first = json.loads((run / "02-grpo" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["approx_kl"] == 0

    lora = shutil.copytree(run / "02-grpo" / "model", project.folder / "lora")
    for model, more, held in (("runs/tiny/02-grpo", (), {"nf4"}), ("lora", ("--on", "base"), set[str]())):
        done = project.main("sample", model, "a red sky", "--steps", "1", *more)
        assert done.status == 0, done.err
        assert networks[-1] == held
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(project.folder / "base")
    pipeline.load_lora_weights(str(lora))
    base = loaded(project.folder / "base")
    base.load_lora(lora)
    theirs, ours = (
        {n: t for n, t in each.state_dict().items() if "lora_" in n}
        for each in (pipeline.transformer, base.transformer)
    )
    assert {n.replace("default_0", "default") for n in theirs} == ours.keys()
    assert all(torch.equal(t, ours[n.replace("default_0", "default")]) for n, t in theirs.items())

    done = project.main("export", "runs/tiny", "grpo", "whole", "--dtype", "fp32")
    assert done.status == 0, done.err
    pipeline.fuse_lora()
    fused = {
        n.replace(".base_layer.", "."): t for n, t in pipeline.transformer.state_dict().items() if "lora_" not in n
    }
    (file,) = (project.folder / "whole").rglob("transformer/*.safetensors")
    merged = load_file(file)
    assert merged.keys() == fused.keys() & merged.keys()
    assert max(float((merged[name] - fused[name]).abs().max()) for name in merged) < 1e-5


def test_full_training_is_refused(project: Project) -> None:
    done = project.main(
        "check", "pipeline.toml", "--set", "backbone.frozen=fp8", "--set", "backbone.train={use='full'}"
    )
    assert done.status == 2
    assert "backbone.frozen: 'fp8' is for weights that do not train, and stage soar trains them all" in done.err
    done = project.main("check", "pipeline.toml", "--set", "backbone.frozen=fp4")
    assert done.status == 2
    assert "'nf4'" in done.err


@pytest.mark.slow
def test_two_processes_share_packed_weights(project: Project) -> None:
    """With FSDP2: each reads and packs its own rows."""
    keys = (LORA, "backbone.frozen='nf4'", "shard=true")
    as_one(project, keys, two(project, "run", "pipeline.toml", *settings("name='two'", *keys)))


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shard", ["false", "true"])
def test_two_processes_leave_what_one_does(bits: str, shard: str, project: Project) -> None:
    keys = (LORA, f"backbone.frozen='{bits}'", f"shard={shard}")
    as_one(project, keys, two(project, "run", "pipeline.toml", *settings("name='two'", *keys)))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("bits", BITS)
def test_compiled_blocks_compute_the_same(bits: str, tmp_path: Path) -> None:
    folder = tiny_sd3(tmp_path / "base", words=WORDS, layers=1)
    plain, compiled = (adapted(loaded(folder, frozen=bits, compile=on)) for on in (False, True))
    (_, expected), (found, gradients) = step(plain), step(compiled)
    assert all((expected[name] - gradients[name]).abs().max() < 1e-4 for name in expected)
    with torch.no_grad():
        assert torch.equal(velocity(compiled), found)
