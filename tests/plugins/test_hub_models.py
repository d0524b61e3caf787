"""Of a model on the hub, those files are fetched and hashed that it is read from, and no other (tests/hub.py)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import hub as stand_in
import pytest
import torch
from hub import Hub
from safetensors.torch import load, save

from corefit.errors import ModelError
from corefit.testing import tiny_sd3
from corefit_backbones import hub as hub_of_models
from corefit_backbones.hub import used
from corefit_backbones.sd3 import Sd3

CPU = torch.device("cpu")
NAME = "organization/model"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
WEIGHTS = [f"text_encoder{n}/model.safetensors" for n in ("", "_2", "_3")] + [
    TRANSFORMER,
    "vae/diffusion_pytorch_model.safetensors",
]
UNUSED = (
    *("README.md", "model.safetensors", "text_encoders/clip_l.safetensors", "sample.png", "vae/model.onnx"),
    *("text_encoder/pytorch_model.bin", "text_encoder/model-00001-of-00002.safetensors"),
    *("text_encoder/flax_model.msgpack", "transformer/ema.safetensors", "vae/diffusion_pytorch_model.bin"),
)


@pytest.fixture(scope="module")
def served() -> Iterator[Hub]:
    with stand_in.serve() as hub:
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd3(tmp_path_factory.mktemp("hub") / "base", words=("a", "dog"))


@pytest.fixture
def hub(served: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub with the tiny SD3, each of its weights in two dtypes, and what lies beside it on the real one."""
    hub = stand_in.take_for_the_hub(served, monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for fetch in (hub_of_models.fetched, hub_of_models.fetched_json):
        fetch.cache_clear()
    files = {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    halves = {name.replace(".safetensors", ".fp16.safetensors"): in_half(files[name]) for name in WEIGHTS}
    hub.create(NAME, **files, **halves, **dict.fromkeys(UNUSED, b"x"))
    return hub


def in_half(weights: bytes) -> bytes:
    return save({name: tensor.half() for name, tensor in load(weights).items()}, {"format": "pt"})


def weights(hub: Hub) -> list[str]:
    return sorted(name for name in hub.gets if not name.endswith((".json", ".txt", ".model")))


def test_json_comes_first_and_then_what_is_read(hub: Hub, folder: Path) -> None:
    backbone = Sd3(NAME)
    assert backbone.latent_shape([16, 16]) == (4, 8, 8)
    assert {Path(name).suffix for name in hub.gets} == {".json"}
    backbone.load(CPU, torch.float32)
    assert weights(hub) == sorted(WEIGHTS)
    assert not {*hub.gets} & {*UNUSED}
    here = Sd3(str(folder))
    here.place(CPU, torch.float32)
    assert backbone.weights_key() == here.weights_key()
    assert backbone.encoding_key() == here.encoding_key()


def test_another_variant_in_the_same_folder_does_not_change_the_hash(hub: Hub) -> None:
    plain = Sd3(NAME)
    before = plain.weights_key()
    fetched = [*hub.gets]
    half = Sd3(NAME, variant="fp16")
    half.load(CPU, torch.float32)
    assert sorted(name for name in hub.gets[len(fetched) :]) == sorted(n.replace(".saf", ".fp16.saf") for n in WEIGHTS)
    assert plain.weights_key() == before


def test_a_transformer_in_another_file_is_not_fetched(hub: Hub, folder: Path, tmp_path: Path) -> None:
    file = shutil.copy(folder / TRANSFORMER, tmp_path / "tuned.safetensors")
    Sd3(NAME, transformer_=str(file)).load(CPU, torch.float32)
    assert weights(hub) == []
    backbone = Sd3(NAME, transformer_=str(file))
    backbone.place(CPU, torch.float32)
    backbone.encode_text(["a dog"])
    assert weights(hub) == sorted({*WEIGHTS} - {TRANSFORMER})


def test_what_was_fetched_is_found_without_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    Sd3(NAME).load(CPU, torch.float32)
    for fetch in (hub_of_models.fetched, hub_of_models.fetched_json):
        fetch.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    Sd3(NAME).load(CPU, torch.float32)


@pytest.mark.parametrize("had", ["JSON alone", "all but one file", "one shard of two"])
def test_a_part_of_a_model_is_not_taken_for_it_without_the_hub(hub, folder, tmp_path, monkeypatch, had) -> None:
    backbone = Sd3(NAME)
    backbone.latent_shape([16, 16])
    if had != "JSON alone":
        backbone.load(CPU, torch.float32)
        (file,) = (tmp_path / "cache").rglob(f"snapshots/*/{TRANSFORMER}")
        file.rename(file.with_name("diffusion_pytorch_model-00001-of-00002.safetensors" if "shard" in had else "gone"))
    for fetch in (hub_of_models.fetched, hub_of_models.fetched_json):
        fetch.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=rf"{NAME}: the hub did not give its weights: .*(127.0.0.1|[Cc]onnect)"):
        Sd3(NAME).load(CPU, torch.float32)


def test_a_hub_that_gives_no_weights_is_told(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="other/model: the hub did not give its weights"):
        hub_of_models.fetched("other/model", None, None, (), None)


CASES = {
    "one file and shards, of diffusers": ("diffusers", None, ["b-1-of-2", "b-2-of-2", "index"]),
    "one file and shards, of transformers": ("transformers", None, ["b", "index"]),
    "a variant": ("diffusers", "fp16", ["b.fp16", "index"]),
    "a variant that is not there": ("transformers", "bf16", ["b", "index"]),
}


@pytest.mark.parametrize("case", CASES)
def test_of_several_copies_that_is_used_which_the_library_reads(case: str) -> None:
    library, variant, expected = CASES[case]
    names = ["b", "b.fp16", "b-1-of-2", "b-2-of-2"]
    long = {name: f"{name.replace('b', 'model', 1)}.safetensors" for name in names}
    long["index"] = "model.safetensors.index.json"
    found = used([*long.values(), "model.bin", "ema.safetensors"], library, variant)
    assert sorted(found) == sorted(long[name] for name in expected)
