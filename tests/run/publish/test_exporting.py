"""`corefit export`: what it writes is loaded again, by diffusers and by the rules of ComfyUI."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from attrs import frozen
from conftest import Ended
from safetensors import safe_open
from safetensors.torch import load_file

from corefit.run.publish import metadata
from corefit.testing import tiny_flux, tiny_sd3, tiny_wan
from corefit_backbones.flux import Flux
from corefit_backbones.sd3 import Sd3
from corefit_backbones.wan import Wan

WORDS = ("a", "red", "dog")
FILE = "transformer/diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"
CPU = torch.device("cpu")
MAKERS: Mapping[str, tuple[Callable[..., Path], Any, dict[str, Any]]] = {
    "sd3": (tiny_sd3, Sd3, {"dual_attention_layers": (0,)}),
    "flux": (tiny_flux, Flux, {}),
    "wan": (tiny_wan, Wan, {"experts": 2}),
}


@frozen
class Run:
    """A run of two stages: "full" trained all weights, "lora" a LoRA on them, of which alpha is not the rank."""

    folder: Path
    base: Path
    kind: Any
    export: Callable[..., Ended]
    """`corefit export RUN ...` as a user types it; paths are those of the folder."""

    @property
    def full(self) -> Path:
        return self.folder / "runs" / "r" / "01-full" / "model"

    @property
    def lora(self) -> Path:
        return self.folder / "runs" / "r" / "02-lora" / "model"


def trained(base: Path, kind: Any, target: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Save a model of which each tensor is changed."""
    backbone = kind(str(base))
    backbone.load(CPU, torch.float32)
    for name, p in backbone.transformer.named_parameters():
        p.data = change(name, p.data)
    target.mkdir(parents=True)
    backbone.save(target)


def adapted(base: Path, kind: Any, target: Path) -> None:
    from peft import LoraConfig

    backbone = kind(str(base))
    backbone.load(CPU, torch.float32)
    backbone.transformer.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=list(backbone.lora_targets)))
    numbers = torch.Generator().manual_seed(1)
    for name, p in backbone.transformer.named_parameters():
        if ".lora_" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=numbers)
    target.mkdir(parents=True)
    backbone.save(target)


def noise(seed: int = 0) -> Callable[[str, torch.Tensor], torch.Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    return lambda name, tensor: tensor + 1e-3 * torch.randn(tensor.shape, generator=numbers)


def run_of(family: str, folder: Path, export: Callable[..., Ended]) -> Run:
    make, kind, keys = MAKERS[family]
    made = Run(folder, make(folder / "base", words=WORDS, **keys), kind, export)
    trained(made.base, kind, made.full, noise())
    adapted(made.full, kind, made.lora)
    tables = {
        "name": "r",
        "backbone": {"use": family, "path": "../../base", "train": {"use": "full"}},
        "data": {"size": [16, 16], "trigger": "ohwx"},
        "stage": [{"name": "full"}, {"name": "lora"}],
    }
    (folder / "runs/r/pipeline.toml").write_text(tomli_w.dumps(tables))
    return made


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Run]:
    """Of each family; not to be changed by tests."""
    return {family: run_of(family, tmp_path_factory.mktemp(family), lambda: None) for family in MAKERS}  # pyright: ignore[reportArgumentType]


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    def main(run: Run, *args: str) -> Ended:
        from corefit.cli import main

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["corefit", "export", str(run.folder / "runs/r"), *args])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return Ended(int(ended.value.code or 0), said.out, said.err)

    return main


def good(ended: Ended) -> str:
    assert ended.status == 0, ended.err
    return ended.out


def pictures(pipeline: Any) -> np.ndarray:
    """Two steps of a pipeline of diffusers, as numbers."""
    pipeline.set_progress_bar_config(disable=True)
    keys = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
    return pipeline("a red dog", generator=torch.Generator().manual_seed(3), **keys)[0]


def loaded(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder)


def test_a_merged_lora_gives_the_pictures_of_the_lora_on_what_it_was_trained_on(
    runs: Mapping[str, Run], export: Callable[..., Ended], tmp_path: Path
) -> None:
    run = runs["sd3"]
    assert "with the LoRA merged into them, in float32" in good(export(run, "lora", "merged"))
    pipeline = loaded(run.full)
    without = pictures(pipeline)
    pipeline.load_lora_weights(run.lora)
    wanted, found = pictures(pipeline), pictures(loaded(tmp_path / "merged"))
    assert np.abs(wanted - without).max() > 1e-3, "the LoRA does nothing"
    assert np.abs(wanted - found).max() < 1e-4
    good(export(run, "lora", "comfyui.safetensors", "--as", "lora", "--format", "comfyui"))
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(tmp_path / "comfyui.safetensors")  # without alpha: it is in the weights
    assert np.abs(pictures(pipeline) - wanted).max() < 1e-4


def test_a_file_for_comfyui_gives_every_weight_back_to_the_bit(
    runs: Mapping[str, Run], export: Callable[..., Ended], tmp_path: Path
) -> None:
    from diffusers import SD3Transformer2DModel

    run = runs["sd3"]
    said = good(export(run, "full", "full.safetensors", "--format", "comfyui"))
    assert "models/diffusion_models" in said
    single: Any = SD3Transformer2DModel.from_single_file(
        str(tmp_path / "full.safetensors"), config=str(run.full), subfolder="transformer"
    )
    whole = load_file(run.full / FILE)
    assert {name: t.dtype for name, t in single.state_dict().items()} == {name: t.dtype for name, t in whole.items()}
    assert [name for name, t in single.state_dict().items() if not torch.equal(t, whole[name])] == []
    pipeline = loaded(run.full)
    wanted = pictures(pipeline)
    pipeline.transformer = single
    assert np.abs(pictures(pipeline) - wanted).max() < 1e-4


def test_two_experts_are_two_files_in_a_folder(
    runs: Mapping[str, Run], export: Callable[..., Ended], tmp_path: Path
) -> None:
    from diffusers import WanTransformer3DModel

    run = runs["wan"]
    good(export(run, "full", "pair", "--format", "comfyui"))
    assert {p.name for p in tmp_path.glob("pair/*")} == {"pair-high_noise.safetensors", "pair-low_noise.safetensors"}
    for part, noisy in (("transformer", "high"), ("transformer_2", "low")):
        single: Any = WanTransformer3DModel.from_single_file(
            str(tmp_path / f"pair/pair-{noisy}_noise.safetensors"), config=str(run.full), subfolder=part
        )
        whole = load_file(run.full / FILE.replace("transformer", part, 1))
        assert [name for name, t in single.state_dict().items() if not torch.equal(t, whole[name])] == []


def patched(run: Run, original: Mapping[str, torch.Tensor], lora: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What ComfyUI makes of a LoRA: B @ A is added where a name of diffusers has its rows in the original tensor.

    The halves of the last modulations change places first. Without a key ".alpha", the scale is 1.
    """
    backbone = run.kind(str(run.full))
    backbone.load_empty(torch.float32)
    places = [(made, name) for file in backbone.original().values() for name, made in file.items()]
    found = {name: tensor.clone() for name, tensor in original.items()}
    for key in lora:
        module, end, _ = key.partition(".lora_A.weight")
        if end:
            change = lora[f"{module}.lora_B.weight"] @ lora[key]
            rest = module.partition(".")[2]
            if module.startswith("diffusion_model."):
                found[f"{rest}.weight"] += change
            else:
                made, name = next((made, name) for made, name in places if f"{rest}.weight" in made.parts)
                sizes = [backbone.transformer.state_dict()[part].shape[0] for part in made.parts]
                start = sum(sizes[: made.parts.index(f"{rest}.weight")])
                change = torch.cat(change.chunk(2)[::-1]) if made.swapped else change
                found[name][start : start + len(change)] += change
    return found


@pytest.mark.parametrize("family", MAKERS)
def test_a_lora_for_comfyui_makes_of_the_weights_it_goes_on_what_merging_makes(
    family: str, runs: Mapping[str, Run], export: Callable[..., Ended], tmp_path: Path
) -> None:
    run, pair = runs[family], family == "wan"
    ends = ["-high_noise.safetensors", "-low_noise.safetensors"] if pair else [""]
    names = {what: what if pair else f"{what}.safetensors" for what in ("before", "merged", "alone")}
    good(export(run, "full", names["before"], "--format", "comfyui"))
    good(export(run, "lora", names["merged"], "--format", "comfyui"))
    assert "01-full/model" in good(export(run, "lora", names["alone"], "--format", "comfyui", "--as", "lora"))
    for end in ends:
        before, merged, alone = (
            load_file(tmp_path / name / f"{name}{end}" if pair else tmp_path / name) for name in names.values()
        )
        found = patched(run, before, alone)
        assert found.keys() == merged.keys()
        assert any(not torch.equal(t, before[name]) for name, t in merged.items())
        assert max(float((t - merged[name]).abs().max()) for name, t in found.items()) < 1e-6


def test_a_difference_of_full_rank_gives_the_pictures_of_the_trained_weights(
    runs: Mapping[str, Run], export: Callable[..., Ended], tmp_path: Path
) -> None:
    """Where only matrices of linear layers were trained; their bias is what a LoRA cannot change."""
    run = Run(tmp_path, runs["sd3"].base, Sd3, export)
    linear = noise(5)
    keep = lambda name, t: linear(name, t) if t.ndim == 2 else t  # noqa: E731
    trained(run.base, run.kind, run.full, keep)
    tables = {"name": "r", "backbone": {"use": "sd3", "path": str(run.base)}, "stage": [{"name": "full"}]}
    (tmp_path / "runs/r/pipeline.toml").write_text(tomli_w.dumps(tables))
    said = good(export(run, "full", "lora", "--as", "lora", "--rank", "32"))
    assert "rank 32 keeps 100.00% of the difference" in said
    assert "cannot hold" not in said
    pipeline = loaded(run.base)
    before = pictures(pipeline)
    pipeline.load_lora_weights(tmp_path / "lora")
    wanted = pictures(loaded(run.full))
    assert np.abs(before - wanted).max() > 1e-3, "the difference does nothing"
    assert np.abs(pictures(pipeline) - wanted).max() < 1e-4
    again = Sd3(str(run.base))
    again.load(CPU, torch.float32)
    again.load_lora(tmp_path / "lora")


@pytest.mark.parametrize("family", MAKERS)
def test_the_difference_for_comfyui_is_the_one_for_diffusers(
    family: str, runs: Mapping[str, Run], export: Callable[..., Ended], tmp_path: Path
) -> None:
    run = runs[family]
    out = "c" if family == "wan" else "c.safetensors"
    said = good(export(run, "lora", out, "--as", "lora", "--rank", "4", "--format", "comfyui"))
    assert "biases" in said
    good(export(run, "lora", "d", "--as", "lora", "--rank", "4", "--dtype", "bf16"))
    files = sorted((tmp_path / out).glob("*")) or [tmp_path / out] if family == "wan" else [tmp_path / out]
    comfyui = [t for file in files for t in load_file(file).values()]
    diffusers = [t for file in sorted((tmp_path / "d").glob("*")) for t in load_file(file).values()]
    assert {t.dtype for t in diffusers} == {torch.bfloat16}
    assert {t.dtype for t in comfyui} == {torch.float32}
    total = [sum(float(t.double().square().sum()) for t in each) for each in (comfyui, diffusers)]
    assert total[0] == pytest.approx(total[1], rel=1e-2)
    assert {4 in t.shape for t in comfyui} == {True}


def test_a_cast_says_what_is_left_of_training(
    runs: Mapping[str, Run], export: Callable[..., Ended], tmp_path: Path
) -> None:
    run = runs["sd3"]
    said = good(export(run, "full", "half", "--dtype", "bf16"))
    base, full, half = (load_file(folder / FILE) for folder in (run.base, run.full, tmp_path / "half"))
    assert {t.dtype for t in half.values()} == {torch.bfloat16}
    moved = {name: full[name] != base[name] for name in full}
    kept = sum(int(((half[n] != base[n].bfloat16()) & moved[n]).sum()) for n in full)
    share = kept / sum(int(m.sum()) for m in moved.values())
    assert 0 < share < 1
    assert f"{share:.1%} still differ from the base's" in said
    assert pictures(loaded(tmp_path / "half")).shape == (1, 16, 16, 3)


def test_modules_that_diffusers_keeps_in_float32_stay_so(
    runs: Mapping[str, Run], export: Callable[..., Ended], tmp_path: Path
) -> None:
    good(export(runs["wan"], "full", "half", "--dtype", "bf16"))
    half = load_file(tmp_path / "half" / FILE)
    assert half["scale_shift_table"].dtype == torch.float32
    assert half["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16


def test_a_base_that_has_gone_costs_the_comparison_alone(
    tmp_path: Path, runs: Mapping[str, Run], export: Callable[..., Ended]
) -> None:
    run = run_of("flux", tmp_path, export)
    run.base.rename(tmp_path / "elsewhere")
    said = good(export(run, "full", "half", "--dtype", "bf16"))
    assert "is not known, as the base cannot be read" in said
    assert (tmp_path / "half" / FILE).is_file()


def test_numbers_too_large_for_fp16_are_refused(tmp_path: Path, export: Callable[..., Ended]) -> None:
    run = run_of("flux", tmp_path, export)
    file = run.full / FILE
    weights = load_file(file)
    weights["proj_out.weight"][0, 0] = 1e5
    file.unlink()
    from safetensors.torch import save_file

    save_file(weights, file, {"format": "pt"})
    for out, options in (("half", ()), ("half.safetensors", ("--format", "comfyui"))):
        ended = export(run, "full", out, "--dtype", "fp16", *options)
        assert (ended.status, ended.out) == (2, "")
        assert "proj_out.weight has numbers up to 1e+05, which torch.float16 cannot hold; choose bf16" in ended.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "runs"], "nothing is left half-written"


WRONG = {
    "a LoRA without a rank": (("full", "x", "--as", "lora"), "such as --rank 64"),
    "a rank for a model": (("full", "x", "--rank", "4"), "add --as lora"),
    "a rank that no matrix has": (("full", "x", "--as", "lora", "--rank", "999"), "no matrix of this network has"),
    "a folder for one file": (("full", "x", "--format", "comfyui"), "name one that ends in .safetensors"),
    "no such stage": (("ful", "x"), "did you mean 'full'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_refused_with_what_to_do(
    case: str, runs: Mapping[str, Run], export: Callable[..., Ended], tmp_path: Path
) -> None:
    args, words = WRONG[case]
    ended = export(runs["sd3"], *args)
    assert (ended.status, ended.out) == (2, "")
    assert words in ended.err
    assert list(tmp_path.iterdir()) == []


def test_a_file_for_two_networks_is_refused(
    runs: Mapping[str, Run], export: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = export(runs["wan"], "full", "x.safetensors", "--format", "comfyui")
    assert ended.status == 2
    assert "2 files, high_noise and low_noise; name a folder" in ended.err


def test_nothing_is_overwritten(runs: Mapping[str, Run], export: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    ended = export(runs["sd3"], "full", "mine")
    assert ended.status == 2
    assert "mine exists already; name another" in ended.err
    assert (tmp_path / "mine").read_text() == "mine"


def test_what_a_killed_export_left_is_replaced_and_equal_exports_are_equal_bytes(
    runs: Mapping[str, Run], export: Callable[..., Ended], tmp_path: Path
) -> None:
    (tmp_path / ".a.part").mkdir()
    (tmp_path / ".a.part" / "half-written").write_text("")
    (tmp_path / ".a.safetensors.part").write_text("half")
    for name in ("a", "b"):
        good(export(runs["sd3"], "lora", name))
        good(export(runs["sd3"], "lora", f"{name}.safetensors", "--format", "comfyui", "--as", "lora"))
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.safetensors", "b", "b.safetensors"]


def test_headers_say_what_the_files_are(tmp_path: Path, export: Callable[..., Ended]) -> None:
    """Without "format", transformers and diffusers refuse a file. With alpha in the weights, its scale is 1."""
    run = run_of("flux", tmp_path, export)
    spec = {"ss_network_dim": "2", "ss_network_alpha": "6.0", "modelspec.trigger_phrase": "ohwx"}
    metadata.stamp(run.lora, {**spec, "modelspec.usage_hint": "Trigger word: ohwx; Set the strength to 3"})
    comfyui = ("--format", "comfyui")
    good(export(run, "lora", "model.safetensors", *comfyui))
    good(export(run, "lora", "alone.safetensors", *comfyui, "--as", "lora"))
    good(export(run, "lora", "alone", "--as", "lora"))
    good(export(run, "lora", "difference.safetensors", *comfyui, "--as", "lora", "--rank", "3"))
    model, alone, difference = (metadata.read(tmp_path / f"{n}.safetensors") for n in ("model", "alone", "difference"))
    assert {each["format"] for each in (model, alone, difference)} == {"pt"}
    assert model["modelspec.architecture"] == "Flux.1-dev"
    assert difference["modelspec.architecture"] == "Flux.1-dev/lora"
    assert {each["modelspec.trigger_phrase"] for each in (model, alone, difference)} == {"ohwx"}
    assert (alone["ss_network_alpha"], alone["modelspec.usage_hint"]) == ("2.0", "Trigger word: ohwx")
    assert "lora_adapter_metadata" not in alone
    kept = metadata.read(tmp_path / "alone" / LORA)
    assert kept == metadata.read(run.lora / LORA)
    own, saved = load_file(tmp_path / "alone" / LORA), load_file(run.lora / LORA)
    assert own.keys() == saved.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in saved.items())


# a backbone of a third party

PLAIN = '''
from attrs import define
from corefit import Offers, hookimpl
from corefit_backbones.sd3 import Sd3

@define(eq=False, slots=False)
class Plain:
    """SD3 by delegation, without what a Backbone may implement besides."""

    path: str

    def __attrs_post_init__(self):
        self.inner = Sd3(self.path)

    def from_saved(self, folder):
        return Plain(str(folder))

    def __getattr__(self, name):
        if name in {"load", "load_lora", "save", "transformer", "lora_targets"}:
            return getattr(self.inner, name)
        raise AttributeError(name)
'''


def test_a_backbone_of_required_methods_alone_is_exported_for_diffusers(
    runs: Mapping[str, Run], export: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from corefit.run.publish import output

    names: dict[str, Any] = {}
    exec(PLAIN, names)
    run = runs["sd3"]
    monkeypatch.setattr(output.Output, "base", lambda self: names["Plain"](str(run.base)))  # pyright: ignore[reportUnknownLambdaType]
    good(export(run, "lora", "plain"))
    good(export(run, "full", "half", "--dtype", "bf16"))
    good(export(run, "full", "difference", "--as", "lora", "--rank", "4"))
    ended = export(run, "lora", "plain.safetensors", "--format", "comfyui")
    assert ended.status == 2
    assert "Plain does not say how its tensors are called in ComfyUI" in ended.err
    monkeypatch.undo()
    good(export(run, "lora", str(tmp_path / "streamed")))
    plain, streamed = (load_file(tmp_path / name / FILE) for name in ("plain", "streamed"))
    assert plain.keys() == streamed.keys()
    assert max(float((plain[n] - t).abs().max()) for n, t in streamed.items()) < 1e-7
    half = load_file(tmp_path / "half" / FILE)
    assert half["proj_out.weight"].dtype == torch.bfloat16
    settings = json.loads(
        safe_open(tmp_path / "difference" / LORA, "pt").metadata()["lora_adapter_metadata"]  # pyright: ignore[reportUnknownMemberType]
    )
    assert settings["transformer.r"] == 4
