import json
import shutil
import subprocess
import sys
import typing
from itertools import pairwise
from pathlib import Path

import attrs
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from corefit import Condition
from corefit.errors import ConfigError, CorefitError, ModelError
from corefit.testing.checkpoints import tiny_sd3
from corefit_backbones.sd3 import Sd3

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "blue square"]
LENGTH = 24
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root, words = tmp_path_factory.mktemp("sd3"), ["a", "red", "blue", "circle", "square"]
    return {
        "sd3": tiny_sd3(root / "sd3", words=words),
        "sd3.5-medium": tiny_sd3(root / "medium", words=words, dual_attention_layers=(0,)),
    }


@pytest.fixture(scope="session")
def folder(folders):
    return folders["sd3"]


@pytest.fixture
def copy(folder, tmp_path):
    """A checkpoint that a test may spoil."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="session")
def backbone(folder):
    """Not to be changed by tests."""
    return loaded(folder)


def loaded(folder, dtype=torch.float32, **keys):
    backbone = Sd3(str(folder), max_sequence_length=LENGTH, **keys)
    backbone.load(CPU, dtype)
    return backbone


def rewrite(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def state(n=2, height=8, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, height, width, generator=generator), torch.linspace(0.9, 0.3, n)


@torch.no_grad()
def sampled(backbone, x, scale, steps):
    """Plain Euler over the checkpoint's grid: the latents after each step."""
    grid, cond, states = backbone.sigmas(steps, x.shape[1:]), backbone.encode_text(PROMPTS), []
    for sigma, after in pairwise(grid):
        x = x + (after - sigma) * backbone.guided(x, sigma.expand(len(x)), cond, scale)
        states.append(x)
    return states


def sampled_by_diffusers(folder, x, scale, steps):
    states = []

    def keep(pipe, step, timestep, values):
        states.append(values["latents"])
        return {}

    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        PROMPTS,
        latents=x,
        height=2 * x.shape[2],
        width=2 * x.shape[3],
        guidance_scale=scale,
        num_inference_steps=steps,
        max_sequence_length=LENGTH,
        output_type="pt",
        callback_on_step_end=keep,
    ).images
    return states, images


def largest(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ["sd3", "sd3.5-medium"])
@pytest.mark.parametrize("scale", [4.5, 1.0])
def test_samples_as_diffusers_does_at_every_step(folders, name, scale):
    x, backbone = state(width=12)[0], loaded(folders[name])
    ours = sampled(backbone, x, scale, steps=6)
    theirs, images = sampled_by_diffusers(folders[name], x, scale, steps=6)
    assert largest(ours, theirs) < 1e-4
    assert largest([backbone.decode(ours[-1])], [images]) < 1e-4


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shifting_follows_the_image_as_in_diffusers(copy, kind):
    config = copy / "scheduler" / "scheduler_config.json"
    rewrite(config, use_dynamic_shifting=True, time_shift_type=kind, base_image_seq_len=4, max_image_seq_len=64)
    x, backbone = state(width=12)[0], loaded(copy)
    assert largest(sampled(backbone, x, 3.0, 4), sampled_by_diffusers(copy, x, 3.0, 4)[0]) < 1e-4
    small, large = backbone.shift((4, 4, 4)), backbone.shift((4, 16, 16))
    assert (small, large) == pytest.approx((1.6487, 3.1582) if kind == "exponential" else (0.5, 1.15), abs=1e-4)


def test_grid_and_shift_are_the_schedulers(backbone):
    grid = backbone.sigmas(40, (4, 8, 8))
    assert (grid.dtype, grid.device, len(grid)) == (torch.float32, CPU, 41)
    assert grid[[0, -2, -1]].tolist() == pytest.approx([1, 0.0089286, 0], abs=1e-6)
    assert backbone.shift((4, 8, 8)) == 3


def test_encodes_media_as_diffusers_does(folder, backbone):
    media = torch.rand(2, 3, 16, 24)
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    z = pipe.vae.encode(pipe.image_processor.preprocess(media)).latent_dist.mode()
    z = (z - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    assert torch.allclose(backbone.encode(media), z, atol=1e-6)
    assert tuple(z.shape[1:]) == backbone.latent_shape([16, 24])


def test_decodes_into_the_unit_range_and_passes_gradients(backbone):
    x0 = (30 * state()[0]).requires_grad_()
    media = backbone.decode(x0)
    assert (media.dtype, media.min().item() >= 0, media.max().item() <= 1) == (torch.float32, True, True)
    media.sum().backward()
    assert x0.grad.abs().sum() > 0


def test_encodes_text_as_diffusers_does(folder, backbone):
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    with torch.no_grad():  # as the backbone does: with gradients, torch's attention rounds otherwise
        embeds, null, pooled, null_pooled = pipe.encode_prompt(PROMPTS, None, None, max_sequence_length=LENGTH)
    cond, empty = backbone.encode_text(PROMPTS), backbone.null(2)
    assert torch.equal(cond.tensors["prompt_embeds"], embeds)
    assert torch.equal(cond.tensors["pooled"], pooled)
    assert torch.allclose(empty.tensors["prompt_embeds"], null, atol=1e-6)
    assert torch.allclose(empty.tensors["pooled"], null_pooled, atol=1e-6)


def test_a_checkpoint_without_t5_encodes_as_in_diffusers(folder, tmp_path):
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path)
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, max_sequence_length=LENGTH)
    backbone = Sd3(str(tmp_path), max_sequence_length=LENGTH)
    backbone.place(CPU, torch.float32)
    cond = backbone.encode_text(PROMPTS)
    assert torch.equal(cond.tensors["prompt_embeds"], embeds)
    assert torch.equal(cond.tensors["pooled"], pooled)


def test_the_null_condition_is_the_empty_prompts(backbone):
    for name, rows in backbone.null(3).tensors.items():
        assert torch.equal(rows, backbone.encode_text([""]).tensors[name].expand_as(rows))


@torch.no_grad()
def test_guidance_in_one_call_in_two_and_off(backbone):
    (x, sigma), cond = state(), backbone.encode_text(PROMPTS)
    v, null = backbone.velocity(x, sigma, cond), backbone.velocity(x, sigma, backbone.null(2))
    assert torch.equal(backbone.guided(x, sigma, cond, 1.0), v)
    assert backbone.guided(x, sigma, cond, 1.0, v) is v
    for v_cond in (None, v):
        assert torch.allclose(backbone.guided(x, sigma, cond, 4.5, v_cond), null + 4.5 * (v - null), atol=1e-5)


@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours(backbone):
    (x, sigma), cond = state(4), backbone.encode_text(PROMPTS * 2)
    whole = backbone.velocity(x, sigma, cond)
    assert torch.allclose(whole[1:3], backbone.velocity(x[1:3], sigma[1:3], cond[1:3]), atol=1e-5)


def test_only_the_networks_input_is_cast(folder):
    backbone, seen = loaded(folder, torch.bfloat16), {}
    network, cond = backbone.transformer, backbone.encode_text(PROMPTS)

    def spy(**inputs):
        seen.update(inputs)
        return network(**inputs)

    backbone.transformer = spy  # any callable will do, as the trainer's prepared module
    sigma = torch.tensor([0.9993, 0.1])
    v = backbone.velocity(state()[0], sigma, cond)
    assert (v.dtype, seen["hidden_states"].dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(seen["timestep"], 1000 * sigma)


def test_cropped_latents_are_refused(backbone):
    x, sigma = state(height=7, width=8)
    with pytest.raises(AssertionError, match="cropped"):
        backbone.velocity(x, sigma, backbone.encode_text(PROMPTS))


def test_placing_is_enough_to_encode(copy, backbone):
    (copy / "transformer" / WEIGHTS).unlink()
    placed = Sd3(str(copy), max_sequence_length=LENGTH)
    placed.place(CPU, torch.float32)
    media = torch.rand(1, 3, 16, 16)
    assert torch.equal(placed.encode(media), backbone.encode(media))
    assert torch.equal(placed.null(1).tensors["pooled"], backbone.null(1).tensors["pooled"])


def test_encoders_are_read_when_used_and_dropped_by_release(copy):
    backbone = loaded(copy)
    kept = backbone.null(1)
    backbone.encode(torch.rand(1, 3, 16, 16))
    backbone.release()
    for part in ("text_encoder", "vae"):
        shutil.rmtree(copy / part)
    assert torch.equal(backbone.null(2).tensors["pooled"], kept.tensors["pooled"].expand(2, -1))
    with pytest.raises(ModelError, match="text_encoder"):
        backbone.encode_text(PROMPTS)
    with pytest.raises(ModelError, match="vae"):
        backbone.decode(state()[0])


def test_a_cached_empty_prompt_needs_no_encoder(copy):
    (copy / "text_encoder" / "model.safetensors").unlink()
    backbone = loaded(copy)
    backbone.empty = Condition({"prompt_embeds": torch.ones(1, 3, 32), "pooled": torch.ones(1, 32)})
    assert backbone.null(4).tensors["prompt_embeds"].shape == (4, 3, 32)


def test_the_encoding_key_tells_media_from_text(copy):
    def key(dtype=torch.float32, **keys):
        backbone = Sd3(str(copy), **keys)
        backbone.place(CPU, dtype)
        return backbone.encoding_key()

    def changed(now):
        return {name for name in before if before[name] != now[name]}

    before = key()
    assert all(name.startswith(("vae", "text")) for name in before)
    assert changed(key()) == set()
    assert changed(key(max_sequence_length=64)) == {"text_length"}
    assert changed(key(torch.bfloat16)) == {"text_dtype"}
    rewrite(copy / "vae" / "config.json", scaling_factor=1.0)
    assert changed(key()) == {"vae"}
    before = key()
    rewrite(copy / "tokenizer_2" / "tokenizer_config.json", model_max_length=9)
    assert changed(key()) == {"text_tokenizer_2"}
    before = key()
    weights = load_file(copy / "text_encoder" / "model.safetensors")
    save_file({name: t + 1 for name, t in weights.items()}, copy / "text_encoder" / "model.safetensors")
    assert changed(key()) == {"text_encoder"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_pipeline_has_the_same_bits_here_and_in_diffusers(folder, tmp_path, dtype):
    backbone = loaded(folder, dtype)
    with torch.no_grad():
        backbone.transformer.proj_out.weight.add_(1)
    backbone.save(tmp_path / "saved")
    moved = backbone.from_saved(tmp_path / "saved")
    moved.load(CPU, dtype)
    again = moved.transformer
    theirs = StableDiffusion3Pipeline.from_pretrained(tmp_path / "saved", torch_dtype=dtype).transformer
    for name, weights in backbone.transformer.state_dict().items():
        assert torch.equal(weights, again.state_dict()[name])
        assert torch.equal(weights, theirs.state_dict()[name])
    assert load_file(tmp_path / "saved" / "transformer" / WEIGHTS)["proj_out.weight"].dtype == dtype
    assert (tmp_path / "saved" / "vae" / WEIGHTS).samefile(folder / "vae" / WEIGHTS)
    assert moved.encoding_key() == backbone.encoding_key()
    assert moved.weights_key() != backbone.weights_key() == loaded(folder).weights_key()


def test_a_variant_is_upcast_and_saved_under_plain_names(folder, tmp_path):
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    shutil.rmtree(tmp_path / "half" / "text_encoder_3")
    pipe.text_encoder_3.save_pretrained(tmp_path / "half" / "text_encoder_3", variant="fp16", max_shard_size="9KB")
    backbone = loaded(tmp_path / "half", variant="fp16")
    assert {p.dtype for p in backbone.transformer.parameters()} == {torch.float32}
    backbone.save(tmp_path / "saved")
    assert not list((tmp_path / "saved").rglob("*fp16*"))
    moved = backbone.from_saved(tmp_path / "saved")
    moved.load(CPU, torch.float32)
    cond, again = backbone.encode_text(PROMPTS), moved.encode_text(PROMPTS)
    assert torch.equal(cond.tensors["prompt_embeds"], again.tensors["prompt_embeds"])
    StableDiffusion3Pipeline.from_pretrained(tmp_path / "saved")


def with_lora(folder, dtype=torch.float32):
    """Adapted, and not a no-op: B is random too; rank and alpha differ."""
    backbone = loaded(folder, dtype)
    targets = list(backbone.lora_targets)
    backbone.transformer.add_adapter(LoraConfig(r=2, lora_alpha=7, target_modules=targets))
    for i, parameter in enumerate(trainable(backbone.transformer).values()):
        generator = torch.Generator().manual_seed(i)
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return backbone


def trainable(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


class Wrapped(torch.nn.Module):
    """As DistributedDataParallel ("module") and torch.compile ("_orig_mod") wrap a network."""

    def __init__(self, network, name="module"):
        super().__init__()
        self.name = name
        self.add_module(name, network)

    def forward(self, **inputs):
        return self.get_submodule(self.name)(**inputs)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd3", "sd3.5-medium"])
def test_a_saved_lora_means_the_same_in_diffusers(folders, name, tmp_path):
    backbone, base = with_lora(folders[name]), loaded(folders[name])
    assert any(".attn2." in p for p in trainable(backbone.transformer)) == (name == "sd3.5-medium")
    backbone.transformer = Wrapped(Wrapped(backbone.transformer), "_orig_mod")
    backbone.save(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]

    (x, sigma), cond = state(), base.encode_text(PROMPTS)
    expected, plain = backbone.velocity(x, sigma, cond), base.velocity(x, sigma, cond)
    assert (expected - plain).abs().max() > 1e-2
    pipe = StableDiffusion3Pipeline.from_pretrained(folders[name])
    pipe.load_lora_weights(tmp_path)
    assert pipe.transformer.peft_config["default_0"].lora_alpha == 7
    base.transformer = pipe.transformer
    assert torch.equal(base.velocity(x, sigma, cond), expected)


def test_a_saved_lora_is_trainable_again_without_rounding(folder, tmp_path):
    before = with_lora(folder, torch.bfloat16)
    before.save(tmp_path / "a")
    after = loaded(folder, torch.bfloat16)
    after.load_lora(tmp_path / "a")
    expected, found = trainable(before.transformer), trainable(after.transformer)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert all(p.dtype == torch.float32 for p in found.values())
    after.save(tmp_path / "b")
    assert len({(tmp_path / f / "pytorch_lora_weights.safetensors").read_bytes() for f in "ab"}) == 1


def test_every_default_lora_target_exists_and_learns(folder):
    backbone, (x, sigma) = with_lora(folder), state()
    backbone.velocity(x, sigma, backbone.encode_text(PROMPTS)).square().sum().backward()
    adapted = trainable(backbone.transformer)
    assert all(p.grad is not None for p in adapted.values()), "DDP would wait for these"
    assert all(any(f".{target}." in name for name in adapted) for target in backbone.lora_targets)


def spoil_nothing(folder):
    folder.rename(folder.with_name("elsewhere"))


def spoil_bytes(folder):
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"spoilt")


def spoil_metadata(folder):
    file = folder / "pytorch_lora_weights.safetensors"
    save_file(load_file(file), file)


def spoil_layer(folder):
    file, weights = folder / "pytorch_lora_weights.safetensors", {}
    from safetensors import safe_open

    with safe_open(file, "pt") as f:
        metadata = f.metadata()
        weights = {name.replace("blocks.1", "blocks.7"): f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    save_file(weights, file, metadata)


def spoil_shape(folder):
    file = folder / "pytorch_lora_weights.safetensors"
    from safetensors import safe_open

    with safe_open(file, "pt") as f:
        metadata = f.metadata()
    save_file({name: t[..., :1].clone() for name, t in load_file(file).items()}, file, metadata)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_nothing, "no pytorch_lora_weights.safetensors"),
        (spoil_bytes, "pytorch_lora_weights.safetensors: damaged"),
        (spoil_metadata, "no rank and alpha"),
        (spoil_layer, "made for another model"),
        (spoil_shape, "made for another model"),
    ],
)
def test_bad_loras_are_refused(folder, tmp_path, spoil, message):
    with_lora(folder).save(tmp_path / "lora")
    spoil(tmp_path / "lora")
    with pytest.raises(ModelError, match=message):
        loaded(folder).load_lora(tmp_path / "lora")


def test_gradient_checkpointing_gives_the_same_gradients(folder):
    def gradient(on):
        backbone, (x, sigma) = loaded(folder, gradient_checkpointing=on), state()
        assert backbone.transformer.is_gradient_checkpointing == on
        backbone.velocity(x, sigma, backbone.encode_text(PROMPTS)).square().sum().backward()
        return backbone.transformer.transformer_blocks[0].attn.to_q.weight.grad

    assert torch.allclose(gradient(True), gradient(False), rtol=1e-5)


def test_sizes_that_the_transformer_would_crop_or_refuse(backbone):
    assert backbone.latent_shape([64, 16]) == (4, 32, 8)
    with pytest.raises(ConfigError, match=r"width 18 must be a multiple of 4 from 4 to 64 .*nearest: 16 or 20"):
        backbone.latent_shape([16, 18])
    with pytest.raises(ConfigError, match=r"height 68 .*nearest: 64$"):
        backbone.latent_shape([68, 16])
    with pytest.raises(ConfigError, match=r"height 0 .*nearest: 4$"):
        backbone.latent_shape([0, 16])
    with pytest.raises(ConfigError, match=r"\[height, width\]"):
        backbone.latent_shape([16, 16, 9])
    with pytest.raises(ConfigError, match="width 18"):
        backbone.encode(torch.rand(1, 3, 16, 18))


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def change_weights(file, change):
    save_file(change(load_file(file)), file, {"format": "pt"})


def drop_weight(file):
    change_weights(file, lambda weights: {name: t for name, t in weights.items() if name != "proj_out.bias"})


BAD_FOLDERS = {
    "no folder": (shutil.rmtree, "no such folder"),
    "no index": (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
    "index is not JSON": (lambda f: (f / "model_index.json").write_text("{"), "model_index.json: not JSON"),
    "another family": (
        lambda f: rewrite(f / "model_index.json", _class_name="FluxPipeline"),
        'is a FluxPipeline; use = "sd3" reads a StableDiffusion3Pipeline: set use = "flux"',
    ),
    "an unknown family": (
        lambda f: rewrite(f / "model_index.json", _class_name="StableDiffusionPipeline"),
        r"is a StableDiffusionPipeline; .*known families: StableDiffusion3Pipeline \(use = \"sd3\"\)",
    ),
    "no transformer": (lambda f: shutil.rmtree(f / "transformer"), "names transformer: no such folder"),
    "null transformer": (
        lambda f: rewrite(f / "model_index.json", transformer=[None, None]),
        "model_index.json has no transformer",
    ),
    "no config": (lambda f: (f / "vae" / "config.json").unlink(), "vae: no config.json"),
    "channels differ": (
        lambda f: rewrite(f / "vae" / "config.json", latent_channels=8),
        "4 input channels, and the VAE's latents need 8",
    ),
    "another scheduler": (
        lambda f: rewrite(f / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler"),
        "its scheduler is DDIMScheduler",
    ),
    "no weights": (lambda f: (f / "transformer" / WEIGHTS).unlink(), WEIGHTS),
    "truncated weights": (lambda f: truncate(f / "transformer" / WEIGHTS), f"transformer.*{WEIGHTS}: damaged"),
    "a weight is missing": (
        lambda f: drop_weight(f / "transformer" / WEIGHTS),
        f"{WEIGHTS}: the weights of transformer lack proj_out.bias",
    ),
    "a weight too many": (
        lambda f: change_weights(f / "transformer" / WEIGHTS, lambda w: w | {"x.bias": torch.ones(1)}),
        f"{WEIGHTS}: transformer should be a SD3Transformer2DModel, which has no x.bias",
    ),
    "a weight of another shape": (
        lambda f: change_weights(f / "transformer" / WEIGHTS, lambda w: w | {"proj_out.bias": torch.ones(3)}),
        rf"{WEIGHTS}: proj_out.bias has the shape \[3\]; according to config.json a SD3Transformer2DModel has \[16\]",
    ),
    "text for a number": (
        lambda f: rewrite(f / "transformer" / "config.json", num_layers="four"),
        "transformer/config.json: no SD3Transformer2DModel can be made from it",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_are_refused_with_what_is_wrong(copy, case):
    spoil, message = BAD_FOLDERS[case]
    spoil(copy)
    with pytest.raises(ModelError, match=message):
        loaded(copy)


@pytest.mark.parametrize(("part", "file"), [("vae", WEIGHTS), ("text_encoder_3", "model.safetensors")])
def test_damaged_encoders_are_refused_when_used(copy, part, file):
    truncate(copy / part / file)
    backbone = loaded(copy)
    with pytest.raises(ModelError, match=f"{part}.*{file}: damaged"):
        backbone.decode(state()[0]) if part == "vae" else backbone.encode_text(PROMPTS)


def test_other_things_a_user_can_get_wrong(folder):
    with pytest.raises(ValueError, match="max_sequence_length"):
        Sd3(str(folder), max_sequence_length=0)
    with pytest.raises(ModelError, match=r"revision .*is for a name on the hub"):
        Sd3(str(folder), revision="main").latent_shape([16, 16])
    with pytest.raises(ModelError, match="not a name on the hub"):
        Sd3("/no/such/folder").latent_shape([16, 16])


def test_a_hub_that_gives_nothing_is_told(monkeypatch):
    def refuse(name, revision, allow_patterns):
        raise OSError("401: the licence has not been accepted")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(CorefitError, match=r"other/model: no such folder here, .*licence"):
        Sd3("other/model").latent_shape([16, 16])


def test_the_fields_are_the_keys_and_resolve():
    keys = {f.name for f in attrs.fields(Sd3) if f.init}
    speed = {"gradient_checkpointing", "attention", "compile"}
    size = {"frozen", "offload", "text_encoders", "tile"}
    assert keys == {"path", "revision", "variant", "transformer_", "max_sequence_length", *speed, *size}
    assert keys < typing.get_type_hints(Sd3).keys()


def test_configuration_alone_imports_no_torch(folder):
    code = f"""
import sys, typing, corefit_backbones
kind = corefit_backbones.corefit_backbones()["sd3"]
typing.get_type_hints(kind)
assert kind({str(folder)!r}).latent_shape([16, 16]) == (4, 8, 8)
assert kind({str(folder)!r}).shift((4, 8, 8)) == 3
assert not {{"torch", "diffusers", "transformers", "peft", "huggingface_hub"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
