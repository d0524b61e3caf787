"""Every family against diffusers' own pipeline: the same noise and prompts, the same latents after every step.

What sd3 alone has to show is in test_sd3.py.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import frozen
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from vectors import golden as golden_file

import corefit_backbones as package
from corefit.errors import ConfigError, ModelError
from corefit.system import memory
from corefit.testing import check_backbone, tiny_chroma, tiny_flux, tiny_wan
from corefit.train import weights
from corefit_backbones import network, patches, schedule
from corefit_backbones.chroma import Chroma
from corefit_backbones.flux import Flux
from corefit_backbones.wan import Wan

CPU = torch.device("cpu")
WORDS = ("a", "picture", "of", "red", "blue", "sky", "dog")
PROMPTS = ["a red dog", "a picture of the sky"]
LENGTH = 16


@frozen
class Family:
    """How a family's checkpoint is made, which size it samples at, and what its pipeline calls them."""

    kind: type[Any]
    make: Callable[..., Path]
    keys: dict[str, Any]
    size: tuple[int, ...]
    scale: float


FAMILIES = {
    "flux dev": Family(Flux, tiny_flux, {}, (24, 32), 3.5),
    "flux dev large": Family(Flux, tiny_flux, {}, (64, 48), 3.5),
    "flux schnell": Family(Flux, tiny_flux, {"guidance_embeds": False}, (24, 32), 1.0),
    "flux schnell guided": Family(Flux, tiny_flux, {"guidance_embeds": False}, (24, 32), 3.0),
    "chroma": Family(Chroma, tiny_chroma, {}, (24, 32), 4.0),
    "wan": Family(Wan, tiny_wan, {}, (5, 32, 48), 5.0),
    "wan unguided": Family(Wan, tiny_wan, {}, (9, 16, 16), 1.0),
    "wan 2.2 5B": Family(Wan, tiny_wan, {"expand_timesteps": True, "packed_vae": True, "shift": 5.0}, (5, 32, 64), 5.0),
    "wan 2.2 A14B": Family(Wan, tiny_wan, {"experts": 2}, (5, 32, 32), 4.0),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made: dict[str, Path] = {}
    for family in FAMILIES.values():
        key = key_of(family)
        if key not in made:
            made[key] = family.make(tmp_path_factory.mktemp("family") / "base", words=WORDS, **family.keys)
    return made


def key_of(family: Family) -> str:
    return json.dumps([family.kind.__name__, family.keys])


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def folder(family: Family, folders: dict[str, Path]) -> Path:
    return folders[key_of(family)]


def loaded(family: Family, folder: Path, dtype: torch.dtype = torch.float32, **keys: Any) -> Any:
    backbone = family.kind(str(folder), max_sequence_length=LENGTH, **keys)
    backbone.load(CPU, dtype)
    return backbone


def state(backbone: Any, size: tuple[int, ...], n: int = 2) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, *backbone.latent_shape(size), generator=torch.Generator().manual_seed(0))
    return x, torch.linspace(0.95, 0.2, n)


def pipeline(family: Family, folder: Path) -> Any:
    """diffusers' own, with Euler's steps where the folder says UniPC's; their grids are compared elsewhere."""
    import diffusers

    pipe = getattr(diffusers, family.kind.pipeline_class).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if pipe.scheduler.__class__.__name__ == schedule.UNIPC:
        shift = pipe.scheduler.config.flow_shift
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    return pipe


@pytest.fixture
def euler(family: Family, folder: Path, tmp_path: Path) -> Path:
    """The folder with `pipeline`'s scheduler."""
    copied = Path(shutil.copytree(folder, tmp_path / "euler"))
    pipeline(family, folder).scheduler.save_pretrained(copied / "scheduler")
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", schedule.EULER]}))
    return copied


def sizes(size: tuple[int, ...]) -> dict[str, int]:
    return dict(zip(("num_frames", "height", "width")[-len(size) :], size, strict=True))


def guidance(family: Family) -> dict[str, Any]:
    if family.kind is Flux and not family.keys.get("guidance_embeds", True):
        return {"true_cfg_scale": family.scale, "negative_prompt": [""] * len(PROMPTS)} if family.scale != 1 else {}
    return {"guidance_scale": family.scale}


@torch.no_grad()
def test_samples_as_diffusers_does_at_every_step(family: Family, euler: Path) -> None:
    backbone, theirs = loaded(family, euler), list[Tensor]()
    x, _ = state(backbone, family.size)

    def keep(pipe: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        theirs.append(values["latents"])
        return {}

    packed = family.kind is not Wan
    made = pipeline(family, euler)(
        PROMPTS,
        latents=patches.pack(x) if packed else x,
        num_inference_steps=6,
        max_sequence_length=LENGTH,
        output_type="pt",
        callback_on_step_end=keep,
        **sizes(family.size),
        **guidance(family),
    )
    grid, cond = backbone.sigmas(6, x.shape[1:]), backbone.encode_text(PROMPTS)
    for (sigma, after), expected in zip(pairwise(grid), theirs, strict=True):
        x = x + (after - sigma) * backbone.guided(x, sigma.expand(len(x)), cond, family.scale)
        latents = patches.unpack(expected, x.shape[-2:]) if packed else expected
        assert (x - latents).abs().max() < 1e-4
    media = made.images if packed else made.frames.transpose(1, 2)
    assert (backbone.decode(x) - media).abs().max() < 1e-4


@torch.no_grad()
def test_encodes_text_and_media_as_diffusers_does(family: Family, folder: Path) -> None:
    backbone, pipe = loaded(family, folder), pipeline(family, folder)
    if family.kind is Flux:
        embeds, pooled, _ = pipe.encode_prompt(PROMPTS, None, max_sequence_length=LENGTH)
        assert torch.equal(backbone.encode_text(PROMPTS).tensors["pooled"], pooled)
    elif family.kind is Chroma:
        embeds, _, mask, *_ = pipe.encode_prompt(PROMPTS, max_sequence_length=LENGTH)
        assert torch.equal(backbone.encode_text(PROMPTS).tensors["mask"], mask)
    else:
        embeds, null = pipe.encode_prompt(PROMPTS, max_sequence_length=LENGTH)
        assert torch.allclose(backbone.null(2).tensors["prompt_embeds"], null, atol=1e-6)
    assert torch.equal(backbone.encode_text(PROMPTS).tensors["prompt_embeds"], embeds)

    *frames, height, width = family.size
    media, vae = torch.rand(2, 3, *frames, height, width), pipe.vae
    z = vae.encode(media * 2 - 1).latent_dist.mode()
    if family.kind is not Wan:
        expected = (z - vae.config.shift_factor) * vae.config.scaling_factor
    else:
        mean, std = (torch.tensor(t).view(1, -1, 1, 1, 1) for t in (vae.config.latents_mean, vae.config.latents_std))
        expected = (z - mean) / std
    assert torch.allclose(backbone.encode(media), expected, atol=1e-5)
    assert tuple(expected.shape[1:]) == backbone.latent_shape(family.size)


@pytest.mark.parametrize("name", ["flux dev", "flux schnell", "chroma", "wan", "wan 2.2 A14B"])
def test_each_keeps_what_a_backbone_promises(name: str, folders: dict[str, Path]) -> None:
    family = FAMILIES[name]
    backbone = loaded(family, folders[json.dumps([family.kind.__name__, family.keys])])
    media = torch.rand(2, 3, *family.size, generator=torch.Generator().manual_seed(0))
    check_backbone(backbone, prompts=PROMPTS, media=media)


def test_usual_settings_are_those_of_the_family(folders: dict[str, Path]) -> None:
    found = {
        name: FAMILIES[name].kind(str(folders[key_of(FAMILIES[name])])).usual()
        for name in ("flux dev", "chroma", "wan")
    }
    assert {name: (each.guidance, each.steps, each.size) for name, each in found.items()} == {
        "flux dev": (3.5, 28, (1024, 1024)),
        "chroma": (3.0, 40, (1024, 1024)),
        "wan": (5.0, 50, (81, 480, 832)),
    }


def test_a_video_model_makes_pictures_too(folders: dict[str, Path]) -> None:
    family = FAMILIES["wan"]
    backbone = loaded(family, folders[json.dumps([family.kind.__name__, family.keys])])
    check_backbone(backbone, prompts=PROMPTS)
    assert backbone.latent_shape([16, 32]) == backbone.latent_shape([1, 16, 32]) == (4, 1, 2, 4)
    assert backbone.decode(torch.zeros(2, 4, 1, 2, 2)).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("name", ["flux dev", "chroma", "wan"])
def test_decoding_that_is_recomputed_has_the_same_gradient_and_a_row_of_memory(
    name: str, folders: dict[str, Path]
) -> None:
    family = FAMILIES[name]
    backbone = loaded(family, folders[json.dumps([family.kind.__name__, family.keys])])
    x = torch.randn(4, *backbone.latent_shape((5, 16, 16) if family.kind is Wan else (64, 64))).requires_grad_()
    backbone.decode(x)  # reads the VAE
    weight = torch.randn(4)

    def slope(decode: Callable[[Tensor], Tensor]) -> tuple[Tensor, memory.LiveBytes]:
        with memory.track_live_bytes() as held:
            media = decode(x)
            held.kept = held.now
            (found,) = torch.autograd.grad((media.flatten(1).mean(1) * weight).sum(), x)
        return found, held

    kept, of_graph = slope(backbone.decode)
    alone, _ = slope(lambda x: torch.cat([backbone.decode(row) for row in x.split(1)]))
    recomputed, of_rows = slope(partial(backbone.decode, checkpoint=True))
    assert torch.equal(recomputed, alone)
    assert (recomputed - kept).abs().max() < 1e-5 * kept.abs().max()  # kernels round otherwise for four rows
    assert of_rows.kept < 0.1 * of_graph.kept
    assert of_rows.peak < (0.4 if family.kind is Wan else 0.2) * of_graph.peak
    assert not any(p.requires_grad or p.grad is not None for p in backbone.vae().parameters())
    assert not any("forward" in vars(module) for module in backbone.vae().modules())


# guidance


@torch.no_grad()
def test_distilled_guidance_is_one_call(folders: dict[str, Path]) -> None:
    family = FAMILIES["flux dev"]
    backbone = loaded(family, folders[json.dumps([family.kind.__name__, family.keys])])
    (x, sigma), cond, calls = state(backbone, family.size), backbone.encode_text(PROMPTS), list[int]()
    backbone.transformer.register_forward_pre_hook(lambda module, args, kwargs: calls.append(1), with_kwargs=True)
    plain = backbone.velocity(x, sigma, cond)
    guided = backbone.guided(x, sigma, cond, 3.5, plain)
    assert len(calls) == 2
    assert (guided - plain).abs().max() > 1e-4
    assert torch.equal(backbone.guided(x, sigma, cond, 1.0, plain), plain)
    assert len(calls) == 2


# experts


@torch.no_grad()
def test_each_row_goes_through_the_expert_for_its_noise(folders: dict[str, Path]) -> None:
    family = FAMILIES["wan 2.2 A14B"]
    backbone = loaded(family, folders[json.dumps([family.kind.__name__, family.keys])])
    x, _ = state(backbone, family.size, 4)
    sigma, cond = torch.tensor([0.2, 0.95, 0.875, 0.8]), backbone.encode_text(PROMPTS * 2)
    v = backbone.velocity(x, sigma, cond)
    for row, name in enumerate(["transformer_2", "transformer", "transformer", "transformer_2"]):
        network = getattr(backbone.transformer, name)
        one = network(
            x[row : row + 1],
            1000 * sigma[row : row + 1],
            cond.tensors["prompt_embeds"][row : row + 1],
            return_dict=False,
        )[0]
        assert torch.allclose(v[row], one[0], atol=1e-5)


# weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_network_filled_from_its_files_is_the_loaded_one(family: Family, folder: Path, dtype: Any) -> None:
    """What sharded training reads slice by slice is what `load` reads whole, buffers and dtypes included."""
    whole, empty = loaded(family, folder, dtype), family.kind(str(folder), max_sequence_length=LENGTH)
    empty.load_empty(dtype)
    assert all(p.is_meta for p in empty.transformer.parameters())
    weights.fill(empty.transformer, empty, CPU)
    expected = {**whole.transformer.state_dict(), **dict(whole.transformer.named_buffers())}
    found = {**empty.transformer.state_dict(), **dict(empty.transformer.named_buffers())}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    (x, sigma), cond = state(whole, family.size), whole.encode_text(PROMPTS)
    empty.empty = whole.null(1)
    v = whole.velocity(x, sigma, cond)  # its weights lie as they do in the file: kernels may end in other last bits
    torch.testing.assert_close(empty.velocity(x, sigma, cond), v, atol=1e-5, rtol=1e-5)


def test_weights_are_saved_a_tensor_at_a_time(family: Family, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """In several files with an index, which diffusers reads, and so does a stage that starts from them."""
    monkeypatch.setattr(network, "SHARD", 20_000)
    backbone = loaded(family, folder)
    with torch.no_grad():
        for parameter in backbone.transformer.parameters():
            parameter += 1
    backbone.save(tmp_path / "model")
    for name in backbone.networks:
        files = list((tmp_path / "model" / name).glob("*.safetensors"))
        assert len(files) > 3
        assert all(file.stat().st_size < 40_000 or len(load_file(file)) == 1 for file in files)
    expected = backbone.transformer.state_dict()
    again = backbone.from_saved(tmp_path / "model")
    again.load(CPU, torch.float32)
    streamed = backbone.from_saved(tmp_path / "model")
    streamed.load_empty(torch.float32)
    weights.fill(streamed.transformer, streamed, CPU)
    for read in (again, streamed):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in read.transformer.state_dict().items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, name: tensors.pop(name), "lack {name}"),
        (lambda tensors, name: tensors.update(more=torch.zeros(1)), "have more too"),
        (lambda tensors, name: tensors.update({name: torch.zeros(3)}), r"have {name} as \[3\], not"),
    ],
)
def test_files_that_do_not_fit_a_sharded_network_are_named(
    folders: dict[str, Path], tmp_path: Path, change: Any, said: str
) -> None:
    folder = Path(shutil.copytree(next(iter(folders.values())), tmp_path / "base"))
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    change(tensors, name)
    save_file(tensors, file, {"format": "pt"})
    backbone = next(iter(FAMILIES.values())).kind(str(folder))
    backbone.load_empty(torch.float32)
    expected = f"{re.escape(str(folder / 'transformer'))}: the weights {said.format(name=re.escape(name))}"
    with pytest.raises(ModelError, match=expected):
        weights.fill(backbone.transformer, backbone, CPU)


def adapted(family: Family, folder: Path) -> Any:
    backbone = loaded(family, folder)
    backbone.transformer.requires_grad_(False)
    backbone.transformer.add_adapter(LoraConfig(r=2, lora_alpha=7, target_modules=list(backbone.lora_targets)))
    for i, (_, parameter) in enumerate(trained(backbone)):
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    return backbone


def trained(backbone: Any) -> Iterator[tuple[str, Tensor]]:
    return ((name, p) for name, p in backbone.transformer.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["flux dev", "chroma", "wan", "wan 2.2 A14B"])
def test_a_saved_lora_means_the_same_in_diffusers(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    family = FAMILIES[name]
    folder = folders[json.dumps([family.kind.__name__, family.keys])]
    backbone, base, pipe = adapted(family, folder), loaded(family, folder), pipeline(family, folder)
    (x, sigma), cond = state(backbone, family.size), base.encode_text(PROMPTS)
    expected = backbone.velocity(x, sigma, cond)
    expected.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in trained(backbone))

    backbone.save(tmp_path)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    if family.keys.get("experts"):
        second = "pytorch_lora_weights.transformer_2.safetensors"
        pipe.load_lora_weights(tmp_path, weight_name=second, load_into_transformer_2=True)
        base.transformer.transformer, base.transformer.transformer_2 = pipe.transformer, pipe.transformer_2
    else:
        base.transformer = pipe.transformer
    with torch.no_grad():
        assert torch.allclose(base.velocity(x, sigma, cond), expected, atol=1e-6)

    again = loaded(family, folder)
    again.load_lora(tmp_path)
    assert {n: p.tolist() for n, p in trained(again)} == {n: p.tolist() for n, p in trained(backbone)}


def test_lora_keys_are_those_that_others_read(folders: dict[str, Path], tmp_path: Path) -> None:
    """diffusers' own, transformer.<module>.lora_A.weight, but for Wan; what ComfyUI maps is in test_lora_names.py."""
    from safetensors.torch import load_file

    for name in ("flux dev", "chroma"):
        family = FAMILIES[name]
        backbone = adapted(family, folders[json.dumps([family.kind.__name__, family.keys])])
        backbone.save(tmp_path / name)
        keys = load_file(tmp_path / name / "pytorch_lora_weights.safetensors")
        modules = dict(backbone.transformer.named_modules())
        for key in keys:
            path, _, kind = key.removeprefix("transformer.").rpartition(".lora_")
            assert key.startswith("transformer.")
            assert kind in ("A.weight", "B.weight")
            assert path in modules


@pytest.mark.parametrize("name", ["flux dev", "chroma", "wan", "wan 2.2 A14B"])
def test_a_saved_pipeline_has_the_same_bits_here_and_in_diffusers(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    family = FAMILIES[name]
    backbone = loaded(family, folders[json.dumps([family.kind.__name__, family.keys])])
    for parameter in backbone.transformer.parameters():
        parameter.data += 0.01
    backbone.save(tmp_path)
    moved = backbone.from_saved(tmp_path)
    moved.load(CPU, torch.float32)
    assert backbone.weights_key() != moved.weights_key()
    parts = pipeline(family, tmp_path).components
    for key, value in moved.transformer.state_dict().items():
        assert torch.equal(value, backbone.transformer.state_dict()[key])
    experts = dict(moved._parts())
    for part, expert in experts.items():
        assert all(torch.equal(v, parts[part].state_dict()[k]) for k, v in expert.state_dict().items())


# grids, packing


def test_grids_are_the_schedulers_own(folders: dict[str, Path]) -> None:
    from diffusers import UniPCMultistepScheduler

    family = FAMILIES["wan"]
    backbone = loaded(family, folders[json.dumps([family.kind.__name__, family.keys])])
    theirs = UniPCMultistepScheduler.from_config(dict(backbone.schedule))
    theirs.set_timesteps(20)
    grid = backbone.sigmas(20, (4, 2, 4, 4))
    assert torch.equal(grid, theirs.sigmas)
    assert (len(grid), float(grid[-1]), backbone.shift((4, 2, 4, 4))) == (21, 0.0, 3.0)
    assert 0.99999 < float(grid[0]) <= 1


def test_flux_packs_and_shifts_as_published() -> None:
    packing = golden_file("flux_pack")
    latents = packing["latents"]
    packed = patches.pack(latents)
    packing.check("packed", packed)
    packing.check("unpacked", patches.unpack(packed, latents.shape[-2:]))
    packing.check("img_ids", patches.positions(latents))
    schedules = golden_file("schedules")
    config = {
        "_class_name": schedule.EULER,
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "num_train_timesteps": 1000,
    }
    for name in schedules.tensors:
        if name.startswith("flux.L") and name.endswith(".sigmas"):
            tokens, steps = (int(part[1:]) for part in name.split(".")[1:3])
            schedules.check(name, schedule.grid(config, steps, tokens, linear=True))


def test_a_class_is_abstract_or_has_no_subclass() -> None:
    """So every method of a backbone that runs is found in one class, or in an abstract one above it."""
    names = [f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
    held = [kind for name in names for kind in vars(importlib.import_module(name)).values() if inspect.isclass(kind)]
    classes = {kind for kind in held if kind.__module__ in names}
    parents = {base for kind in classes for base in kind.__mro__[1:]} & classes
    assert {kind.__name__ for kind in parents} == {"Diffusers", "Packed"}
    assert all(inspect.isabstract(kind) for kind in parents)


# what a user can get wrong


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("flux dev", (24, 30), r"width 30 must be a multiple of 4.*nearest: 28 or 32"),
        ("flux dev", (5, 24, 24), "this model makes images"),
        ("wan", (6, 16, 16), r"number of frames must be a multiple of 4 and one more; nearest: 5 or 9"),
        ("wan", (5, 16, 24), r"width 24 must be a multiple of 16"),
    ],
)
def test_sizes_that_cannot_be(name: str, size: tuple[int, ...], says: str, folders: dict[str, Path]) -> None:
    family = FAMILIES[name]
    backbone = family.kind(str(folders[json.dumps([family.kind.__name__, family.keys])]))
    with pytest.raises(ConfigError, match=says):
        backbone.latent_shape(size)


@pytest.mark.parametrize("name", ["flux dev", "chroma", "wan"])
def test_a_folder_of_another_family_is_told(name: str, folders: dict[str, Path]) -> None:
    family = FAMILIES[name]
    other = next(f for f in FAMILIES.values() if f.kind is not family.kind)
    backbone = family.kind(str(folders[json.dumps([other.kind.__name__, other.keys])]))
    with pytest.raises(ModelError, match=f'set use = "{other.kind.__name__.lower()}"'):
        backbone.check()


def test_half_an_a14b_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    family = FAMILIES["wan 2.2 A14B"]
    copied = Path(shutil.copytree(folders[json.dumps([family.kind.__name__, family.keys])], tmp_path / "copy"))
    index = copied / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "boundary_ratio": None}))
    with pytest.raises(ModelError, match="must have both boundary_ratio and transformer_2, or neither"):
        Wan(str(copied)).check()
