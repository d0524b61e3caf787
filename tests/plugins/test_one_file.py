"""A transformer in one file is the one in a folder, to the bit, by the names of diffusers or of the original code."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import frozen
from conftest import Project
from safetensors.torch import load_file, save_file

from corefit.errors import ModelError
from corefit.pipeline import read
from corefit.run import identity
from corefit.run.publish.export import put_together
from corefit.testing import tiny_chroma, tiny_flux, tiny_sd3, tiny_wan
from corefit_backbones.chroma import Chroma
from corefit_backbones.flux import Flux
from corefit_backbones.sd3 import Sd3
from corefit_backbones.wan import Wan

CPU = torch.device("cpu")
WORDS = ("a", "red", "dog")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@frozen
class Model:
    """A folder, and in other files the transformer that it no longer has."""

    kind: type[Any]
    folder: Path
    whole: Path
    original: Path
    diffusers: Path

    def of(self, file: Path | None, **keys: Any) -> Any:
        return self.kind(str(self.folder), transformer_=file and str(file), **keys)

    def expected(self) -> Any:
        backbone = self.kind(str(self.whole))
        backbone.load(CPU, torch.float32)
        return backbone


MAKE: dict[str, tuple[type[Any], Callable[..., Path]]] = {
    "sd3": (Sd3, tiny_sd3),
    "flux": (Flux, tiny_flux),
    "chroma": (Chroma, tiny_chroma),
    "wan": (Wan, tiny_wan),
}


def make(name: str, folder: Path) -> Model:
    kind, tiny = MAKE[name]
    model = Model(
        kind, folder / "base", folder / "whole", folder / "original.safetensors", folder / "plain.safetensors"
    )
    tiny(model.whole, words=WORDS)
    backbone = model.expected()
    tensors = backbone.transformer.state_dict()
    (arranged,) = backbone.original().values()
    made = {name: put_together(one, tensors.__getitem__).contiguous() for name, one in arranged.items()}
    others = {"first_stage_model.decoder.weight": torch.zeros(2), "text_encoders.logit_scale": torch.zeros(1)}
    save_file({f"model.diffusion_model.{name}": t for name, t in made.items()} | others, model.original)
    shutil.copytree(model.whole, model.folder)
    shutil.move(model.folder / WEIGHTS, model.diffusers)
    return model


@pytest.fixture(scope="module", params=MAKE)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make(request.param, tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make("sd3", tmp_path_factory.mktemp("sd3"))


def test_both_kinds_of_names_give_the_weights_of_the_folder(model: Model) -> None:
    expected = model.expected().transformer.state_dict()
    for file in (model.original, model.diffusers):
        backbone = model.of(file)
        backbone.check()
        backbone.load(CPU, torch.float32)
        found = backbone.transformer.state_dict()
        assert found.keys() == expected.keys()
        assert [name for name, tensor in found.items() if not tensor.equal(expected[name])] == []
        assert {p.requires_grad for p in backbone.transformer.parameters()} == {True}


def test_rows_are_read_alone_as_shards_are(model: Model) -> None:
    backbone, expected = model.of(model.original), model.expected().transformer.state_dict()
    backbone.load_empty(torch.float32)
    with backbone.stored() as stored:
        assert stored.keys() >= expected.keys()
        for name, tensor in expected.items():
            assert stored[name][1:3].equal(tensor[1:3]), name
            assert stored[name][slice(len(tensor), len(tensor))].equal(tensor[:0]), name


def test_another_file_is_another_model_and_its_place_does_not_matter(sd3: Model, tmp_path: Path) -> None:
    copied = shutil.copy(sd3.diffusers, tmp_path / "other.safetensors")
    keys = {sd3.of(file).weights_key() for file in (sd3.original, sd3.diffusers, copied)}
    assert len(keys) == 2
    tensors = load_file(copied)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, copied, {"format": "pt"})
    assert sd3.of(copied).weights_key() not in keys
    assert sd3.of(copied).config_key() == sd3.of(sd3.diffusers).config_key() != sd3.of(sd3.original).config_key()


def test_what_is_saved_is_whole(sd3: Model, tmp_path: Path) -> None:
    backbone = sd3.of(sd3.original)
    backbone.load(CPU, torch.float32)
    backbone.save(tmp_path / "model")
    saved = backbone.from_saved(tmp_path / "model")
    assert saved.transformer_ is None
    assert load_file(tmp_path / "model" / WEIGHTS).keys() == load_file(sd3.diffusers).keys()
    saved.load(CPU, torch.float32)
    for name, tensor in saved.transformer.state_dict().items():
        assert tensor.equal(backbone.transformer.state_dict()[name])


def without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors.pop(f"model.diffusion_model.{name}")


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "lacks one of several": (without("joint_blocks.0.x_block.attn.qkv.weight"), r"lack .*to_q\.weight.*to_k\.weight"),
    "lacks one": (without("x_embedder.proj.bias"), r"lack pos_embed\.proj\.bias"),
    "too many": (lambda t: t.update({"model.diffusion_model.extra": torch.zeros(1)}), "have extra too"),
    "too few rows": (
        lambda t: t.update({n: x[:-1] for n, x in t.items() if n.endswith("0.x_block.attn.qkv.weight")}),
        r"have transformer_blocks\.0\.attn\.to_v\.weight as \[\d+, \d+\], not",
    ),
    "no transformer": (lambda t: [t.pop(n) for n in [*t] if "diffusion" in n], "lack "),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_of_another_model_is_refused_by_its_name(sd3: Model, tmp_path: Path, wrong: str) -> None:
    change, message = WRONG[wrong]
    tensors = load_file(sd3.original)
    change(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    backbone = sd3.of(tmp_path / "x.safetensors")
    for load in (lambda: backbone.load_blank(torch.float32), lambda: backbone.load(CPU, torch.float32)):
        with pytest.raises(ModelError, match=rf"x\.safetensors: the weights .*{message}"):
            load()


def test_two_networks_are_not_replaced_by_one_file(tmp_path: Path) -> None:
    folder = tiny_wan(tmp_path / "base", words=WORDS, experts=2)
    backbone = Wan(str(folder), transformer_=str(folder / WEIGHTS))
    with pytest.raises(ModelError, match=r"transformer = .*this model has 2 networks.*remove the key"):
        backbone.check()


# as a user types it


@pytest.fixture
def pipeline(project: Project) -> Project:
    """The project with its transformer in a file of its own."""
    base = project.own("base")
    shutil.move(base / WEIGHTS, project.folder / "tuned.safetensors")
    project.swap(('path = "base"', 'path = "base"\ntransformer = "tuned.safetensors"'))
    return project


def test_a_pipeline_names_the_file_beside_it(pipeline: Project) -> None:
    assert pipeline.main("check", "pipeline.toml").status == 0
    assert "not trained yet" in pipeline.main("run", "--dry-run", "pipeline.toml").out


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (lambda file: file.unlink(), "no such file; name the file with the transformer's weights"),
    "cut": (lambda file: file.write_bytes(file.read_bytes()[:-9]), "tuned.safetensors: damaged or incomplete"),
    "no weights": (lambda file: file.write_bytes(b"{}"), "tuned.safetensors: damaged or incomplete"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_check_says_what_is_wrong_with_the_file(pipeline: Project, name: str) -> None:
    spoil, message = SPOILT[name]
    spoil(pipeline.folder / "tuned.safetensors")
    ended = pipeline.main("check", "pipeline.toml")
    assert ended.status == 2
    assert message in ended.err
    assert "Traceback" not in ended.err


def test_a_stage_starts_anew_when_the_file_changes_and_not_when_it_moves(pipeline: Project) -> None:
    file = pipeline.folder / "tuned.safetensors"
    before = identity.of_base(read(pipeline.file))
    moved = file.rename(file.with_name("renamed.safetensors"))
    pipeline.swap(("tuned.safetensors", moved.name))
    assert identity.of_base(read(pipeline.file)).hash == before.hash
    tensors = load_file(moved)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, moved, {"format": "pt"})
    assert identity.of_base(read(pipeline.file)).changes_since(before.parts) == "backbone weights changed"
