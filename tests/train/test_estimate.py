"""What a stage needs of memory: the numbers of a really loaded network, and what a real step holds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve, frozen
from conftest import BRIGHT, WORDS, Project
from published import tiny_clip
from rich.console import Console
from transformers import CLIPModel

from corefit import Batch, Condition, Context
from corefit.cli.commands import memory_size
from corefit.errors import ConfigError
from corefit.pipeline import Pipeline, read
from corefit.rng import Rng
from corefit.rollout.noise import LogitNormal
from corefit.rollout.samplers import Ode
from corefit.system import memory
from corefit.testing import tiny_chroma, tiny_flux, tiny_sd3, tiny_wan
from corefit.train import weights
from corefit.train.estimate import Device, Estimate, estimates, refuse, stages
from corefit.train.estimate.show import print_tables
from corefit.train.estimate.stages import LOSS
from corefit.types import Moving
from corefit_backbones.sd3 import Sd3
from corefit_sft import Sft

MAKE: dict[str, Callable[..., Path]] = {
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "chroma": tiny_chroma,
    "wan": tiny_wan,
}


@pytest.fixture(params=MAKE)
def family(request: pytest.FixtureRequest, project: Project) -> Pipeline:
    (project.folder / "base").unlink()
    MAKE[request.param](project.folder / "base", words=WORDS)
    project.swap(('use = "sd3"', f'use = "{request.param}"'))
    return read(project.file, ["data.size=[32,32]", "stage.soar.micro_batch=2"])


HERE = Device("this one", 1e12, gpu=False)


def of(pipeline: Pipeline, stage: int = 0, world: int = 1, device: Device = HERE) -> Estimate:
    return estimates(pipeline, device, world)[stage]


def measured(pipeline: Pipeline, rows: int) -> int:
    """Bytes that one real forward and backward hold, besides weights and gradients."""
    backbone: Any = pipeline.backbone
    x, sigma = torch.randn(rows, *backbone.latent_shape(pipeline.data.size)), torch.full((rows,), 0.5)
    cond = backbone.encode_text(["a red sky"] * rows)
    for p in backbone.transformer.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    with memory.track_live_bytes() as held:
        backbone.velocity(x, sigma, Condition(cond.tensors)).square().mean().backward()
    return held.peak


@pytest.mark.parametrize("train", ["{use='full'}", "{use='lora', rank=3}"])
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_it_is_what_a_loaded_network_is(family: Pipeline, train: str, checkpointing: str) -> None:
    settings = (f"backbone.train={train}", f"backbone.gradient_checkpointing={checkpointing}", *_SAME)
    pipeline = read(family.folder / "pipeline.toml", settings)
    found, backbone = of(pipeline), pipeline.backbone
    backbone.load(torch.device("cpu"), torch.float32)
    named = weights.make_trainable(backbone, pipeline.mode(pipeline.stage[0]))
    parameters = sum(p.numel() for p in backbone.transformer.parameters())
    trained = sum(p.numel() for p in named.values())
    assert (found.parameters, found.trainable) == (parameters, trained)
    assert found.weights == sum(t.nbytes for t in (*backbone.transformer.parameters(), *backbone.transformer.buffers()))
    assert found.gradients == 4 * trained
    assert found.optimizer == state_of_a_step(list(named.values()))
    loss = LOSS * 2 * 4 * math.prod(backbone.latent_shape(pipeline.data.size))  # which the step below has none of
    assert found.activations == pytest.approx(measured(pipeline, 2) + loss, rel=0.1)


def state_of_a_step(parameters: list[torch.nn.Parameter]) -> int:
    """Bytes of AdamW's moments, once it has made them."""
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return sum(t.nbytes for state in optimizer.state.values() for name, t in state.items() if name != "step")


_SAME = ("data.size=[32,32]", "stage.soar.micro_batch=2")


def test_shards_share_and_copies_cost(project: Project) -> None:
    full = ["backbone.train={use='full'}", "stage.soar.micro_batch=4"]
    plain = of(read(project.file, full))
    shared = of(read(project.file, [*full, "shard=true", "stage.soar.ema=0.9"]), world=4)
    assert shared.certain == pytest.approx((plain.certain + 4 * plain.trainable) / 4)
    assert shared.activations is not None
    assert plain.activations is not None
    assert shared.activations < plain.activations  # a quarter of the rows each


def test_a_moving_copy_costs_as_much_as_an_average(project: Project) -> None:
    @frozen
    class Followed(Sft):
        @property
        def copies(self) -> Mapping[str, Moving]:
            return {name: Moving(lambda n: 0.5) for name in ("old", "older")}

    plain = read(project.file, ["stage.soar.objective={use='sft'}"])
    copied = evolve(plain, stage=tuple(evolve(stage, objective=Followed()) for stage in plain.stage))
    one, other = (estimates(pipeline, HERE, graphs=False)[0] for pipeline in (plain, copied))
    assert (one.copies, other.copies) == (0, 2 * 4 * one.trainable)
    assert other.certain - one.certain == other.saved - one.saved == other.copies


def test_ddp_has_the_gradients_twice(project: Project) -> None:
    alone, two = (of(read(project.file), world=world) for world in (1, 2))
    assert (alone.exchanged, two.exchanged) == (0, alone.gradients)
    assert two.certain == alone.certain + alone.gradients
    assert of(read(project.file, ["shard=true"]), world=2).certain == alone.certain / 2


def test_what_full_training_left_is_not_frozen_in_half(project: Project) -> None:
    """A LoRA on it needs twice the memory of one on the base, unless it was saved in bfloat16."""
    project.swap(('train = { use = "lora", rank = 2 }\n', ""))
    keys = ["stage.grpo.train={use='lora', rank=2}", "precision='bf16'"]
    of_base = read(project.file, ["backbone.train={use='lora', rank=2}", "precision='bf16'"])
    half, exact, rounded = (
        estimates(pipeline, Device.of(1e9), graphs=False)[1]
        for pipeline in (of_base, read(project.file, keys), read(project.file, [*keys, "stage.soar.save_dtype='bf16'"]))
    )
    assert exact.weights - half.weights == 2 * (half.parameters - half.trainable)
    assert rounded.weights == half.weights


def test_the_end_of_a_sharded_stage_holds_one_whole_weight(project: Project) -> None:
    keys = ["backbone.train={use='full'}", "shard=true"]
    one = of(read(project.file, keys), world=64)
    assert one.saved == one.weights + one.optimizer + one.gathered
    assert one.gathered > one.certain, "of 64 processes, each holds less than the largest weight"
    with pytest.raises(ConfigError, match="the largest weight while it is saved"):
        refuse(read(project.file, keys), [one], Device.of((one.saved + one.certain) / 2), world=64)


def test_more_rows_a_graph_take_more(project: Project) -> None:
    one, both = (of(read(project.file, [f"stage.soar.objective.chunk={n}", "data.size=[32,32]"])) for n in (1, 2))
    assert one.activations is not None
    assert both.activations == pytest.approx(2 * one.activations, rel=0.1)


GRADIENT = "stage.grpo.objective={use='reward_gradient', method='draft', steps=4, guidance=1.0, truncation=TRUNCATION}"


def differentiable(project: Project) -> None:
    """Let stage grpo have a reward with a gradient, and no sampler."""
    bright = BRIGHT.replace("    gain:", "    differentiable = True\n    gain:", 1)
    (project.folder / "bright.py").write_text(bright)
    project.swap(('sampler = { use = "flow_sde", noise = 0.7 }\n', ""))


@pytest.mark.parametrize("family", ["sd3", "wan"], indirect=True)
@pytest.mark.parametrize("rows", [1, 4])
def test_gradients_of_rewards_count_the_decoder_and_each_velocity(
    family: Pipeline, project: Project, rows: int
) -> None:
    differentiable(project)
    settings = ["data.size=[64,64]", GRADIENT.replace("TRUNCATION", "2"), f"stage.grpo.micro_batch={rows}"]
    pipeline = read(project.file, settings)
    found, backbone = of(pipeline, 1), pipeline.backbone
    backbone.load(torch.device("cpu"), torch.float32)
    weights.make_trainable(backbone, pipeline.mode(pipeline.stage[1]))
    for p in backbone.transformer.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    batch = batch_of(backbone, rows, pipeline.data.size)
    ctx = Context(backbone, Ode(), LogitNormal(), Rng((), batch.rows), rewards=pipeline.stage[1].reward)
    (part,) = pipeline.stage[1].objective.experience(batch, ctx)
    backbone.decode(part.states[:, 0])  # reads the VAE
    with memory.track_live_bytes() as held:
        (term,) = pipeline.stage[1].objective.terms(part, ctx)
        term.total.backward()
    assert found.activations == pytest.approx(held.peak, rel=0.15)


def batch_of(backbone: Any, rows: int, size: Any) -> Batch:
    prompts = ["a red sky"] * rows
    shape = backbone.latent_shape(size)
    return Batch(None, backbone.encode_text(prompts), prompts, [{}] * rows, range(rows), shape)


def clip_score(key: str, further: str = "") -> str:
    return f"{key}.reward=[{{use='clip_score', path='clip'{further}}}]"


@pytest.fixture
def scored(project: Project) -> list[str]:
    """Settings by which the rewards of stage grpo and of the evaluation are clip_score, with a gradient."""
    tiny_clip(project.folder / "clip")
    project.swap(('sampler = { use = "flow_sde", noise = 0.7 }\n', ""))
    return [clip_score("stage.grpo"), clip_score("eval"), GRADIENT.replace("TRUNCATION", "1")]


def test_networks_of_rewards_count_once_for_equal_keys(project: Project, scored: list[str]) -> None:
    found = estimates(read(project.file, scored), HERE, graphs=False)
    network = CLIPModel.from_pretrained(project.folder / "clip")
    held = sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
    assert [e.rewards for e in found] == [held, held], "evaluation before the first stage has read it"
    assert found[1].certain - found[1].decoder - held == found[1].weights + found[1].gradients + found[1].optimizer
    for further, share in ((", pool='min'", 1), (", dtype='bf16'", 1.5), (", device='cpu'", 1)):
        keys = [*scored, clip_score("eval", further)]
        assert estimates(read(project.file, keys), HERE, graphs=False)[1].rewards == pytest.approx(share * held, 0.01)
    both = [clip_score(key, ", device='cpu'") for key in ("stage.grpo", "eval")]
    assert estimates(read(project.file, [*both, *scored[2:]]), HERE, graphs=False)[1].rewards == 0


def test_the_decoder_counts_where_samples_are_decoded(project: Project) -> None:
    supervised, rewarded = estimates(read(project.file), HERE, graphs=False)
    backbone: Any = read(project.file).backbone
    backbone.place(torch.device("cpu"), torch.float32)
    vae = backbone.vae()
    assert supervised.decoder == 0
    assert rewarded.decoder == sum(t.nbytes for t in (*vae.parameters(), *vae.buffers())) > 0
    assert rewarded.saved > rewarded.weights + rewarded.optimizer + rewarded.copies
    drawn = estimates(read(project.file, ["stage.soar.sample_every=1"]), HERE, graphs=False)[0]
    assert drawn.decoder == rewarded.decoder


def test_the_graph_of_a_reward_is_counted(project: Project, scored: list[str]) -> None:
    (project.folder / "clip").rename(project.folder / "small")
    tiny_clip(project.folder / "clip", pixels=224)
    pipeline = read(project.file, [*scored, "stage.grpo.micro_batch=4"])
    found, backbone = of(pipeline, 1), pipeline.backbone
    backbone.load(torch.device("cpu"), torch.float32)
    weights.make_trainable(backbone, pipeline.mode(pipeline.stage[1]))
    for p in backbone.transformer.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    batch = batch_of(backbone, 4, pipeline.data.size)
    ctx = Context(backbone, Ode(), LogitNormal(), Rng((), batch.rows), rewards=pipeline.stage[1].reward)
    (part,) = pipeline.stage[1].objective.experience(batch, ctx)
    pipeline.stage[1].reward[0].value.score(backbone.decode(part.states[:, 0]), batch.prompts, batch.meta)
    with memory.track_live_bytes() as held:
        (term,) = pipeline.stage[1].objective.terms(part, ctx)
        term.total.backward()
    assert found.activations == pytest.approx(held.peak, rel=0.15)
    assert held.peak > 5e6, "most of it is the reward's"


def test_what_does_not_fit_because_of_a_reward_names_it(project: Project, scored: list[str]) -> None:
    needed = of(read(project.file, scored), 1)
    room = Device("a small one", needed.certain - needed.rewards / 2, gpu=True)
    pipeline = read(project.file, scored)
    with pytest.raises(ConfigError, match=r"stage.\w+: .*rewards \d+ MiB.*device = \"cpu\" for a reward"):
        refuse(pipeline, estimates(pipeline, room, graphs=False), room)


def test_a_gradient_of_rewards_that_is_far_too_large_is_refused(project: Project, scored: list[str]) -> None:
    """That of a clip may be hundreds of GiB; one that is too large by little is a warning, as other activations are."""
    pipeline, card = read(project.file, scored), Device("a GPU", 80 * 2.0**30, gpu=True)
    every = estimates(pipeline, card, graphs=False)
    refuse(pipeline, [every[0], evolve(every[1], activations=100 << 30)], card)
    with pytest.raises(ConfigError, match=r"stage.grpo: the graph of a reward's gradient takes about 500.0 GiB"):
        refuse(pipeline, [every[0], evolve(every[1], activations=500 << 30)], card)


def test_more_velocities_in_a_graph_take_more(project: Project) -> None:
    differentiable(project)
    settings = ([GRADIENT.replace("TRUNCATION", n), "data.size=[32,32]"] for n in "13")
    one, three = (of(read(project.file, keys), 1).activations for keys in settings)
    assert one is not None
    assert three is not None
    assert three > one


def test_what_text_encoders_compute_is_not_known(project: Project) -> None:
    """Their weights are counted; on the CPU they take nothing of a GPU."""
    gpu = Device("a GPU", 1e12, gpu=True, planned=True)
    for where, known in (("device", False), ("cpu", True)):
        pipeline = read(project.file, [f"backbone.text_encoders='{where}'"])
        phase = next(stages._Case.of(pipeline, pipeline.stage[0], gpu, 1, {})._encoding())
        assert (phase.name, phase.known) == ("encoding texts", known)


def test_the_largest_aspect_counts(project: Project) -> None:
    wide = 'aspects = ["1:1", "2:1", "1:3"]'
    square = of(read(project.file, ["data.size=[32,32]"]))
    project.swap(("size = [16, 16]", f"size = [32, 32]\n{wide}"))
    several = of(read(project.file))
    assert square.activations is not None
    assert several.activations is not None
    assert several.activations > square.activations


def test_half_keeps_what_does_not_train_in_two_bytes(project: Project) -> None:
    whole, half = of(read(project.file)), of(read(project.file, ["precision='bf16'"]))
    frozen = whole.parameters - whole.trainable
    assert whole.weights - half.weights == 2 * frozen


def test_a_gpu_keeps_norms_in_float32_and_a_planned_one_has_bfloat16(project: Project) -> None:
    half = ["precision='bf16'", "data.size=[32,32]"]
    cpu, gpu = of(read(project.file, half)), of(read(project.file, half), device=Device.of(1e12))
    assert cpu.activations is not None
    assert gpu.activations is not None
    assert cpu.activations < gpu.activations < 2 * cpu.activations
    assert of(read(project.file, ["data.size=[32,32]"]), device=Device.of(1e12)) == gpu


def test_activations_that_depend_on_values_are_not_known(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def velocity(self: Any, x: torch.Tensor, sigma: torch.Tensor, cond: Condition) -> torch.Tensor:
        return x[sigma > 0.5]

    monkeypatch.setattr("corefit_backbones.sd3.Sd3.velocity", velocity)
    assert of(read(project.file)).activations is None
    assert "not known" in project.main("check", "pipeline.toml").out


def test_tensors_that_are_no_buffers_are_there_too(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tables of positions are in some networks."""
    expected, plain = of(read(project.file)).activations, Sd3.load_blank

    def load_blank(self: Sd3, dtype: torch.dtype) -> None:
        plain(self, dtype)
        self.transformer.table = torch.zeros(1, device="meta")
        self.transformer.register_forward_pre_hook(
            lambda net, args, keys: (args, {**keys, "timestep": keys["timestep"] + net.table}), with_kwargs=True
        )

    monkeypatch.setattr(Sd3, "load_blank", load_blank)
    assert of(read(project.file)).activations == pytest.approx(expected, rel=0.01)


def test_a_backbone_that_does_not_say_is_not_estimated(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corefit.train.estimate.stages.Sized", Project)  # which no backbone is
    ended = project.main("check", "pipeline.toml")
    assert ended.status == 0
    assert "memory: not known" in ended.out


def test_many_stages_are_shown_as_few_columns(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """Stages that need the same share a column, and what is wider than the terminal goes on below."""
    pipeline = read(project.file)
    one = of(pipeline)
    device = Device("this device", 2**34, gpu=False)
    alike = [evolve(one, stage=f"arm{number}") for number in range(7)]
    others = [evolve(one, stage=f"other{number}", copies=float(2**20 * number)) for number in range(1, 12)]
    print_tables([*alike, *others], device, Console(width=80))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    heads = "\n".join(line for line in lines if not re.search(r"\d [MGK]iB|─|activations|parameters|train", line))
    assert [name for name in ("arm0", "arm3", "and 3 more", "other1", "other11") if heads.count(name) < 1] == []
    assert "arm4" not in heads
    assert sum(line.startswith("while training") for line in lines) > 1, "several tables"


def test_checkpointing_keeps_less(project: Project) -> None:
    (project.folder / "base").unlink()
    tiny_sd3(project.folder / "base", words=WORDS, layers=8)
    plain, less = (of(read(project.file, [f"backbone.gradient_checkpointing={on}"])) for on in ("false", "true"))
    assert plain.activations is not None
    assert less.activations is not None
    assert less.activations < 0.4 * plain.activations
    assert less.certain == plain.certain


def test_check_says_it_and_reads_no_weights(project: Project) -> None:
    ended = project.main("check", "pipeline.toml", "--memory", "1GiB")
    assert ended.status == 0, ended.err
    assert re.search(r"each process +soar +grpo", ended.out)
    for name in (
        "parameters",
        "that train",
        "weights",
        "gradients",
        "optimizer",
        "activations, about",
        "while reading weights",
        "while training",
        "while saving",
    ):
        assert re.search(rf"^{name} +\S+.* +\S+", ended.out, re.MULTILINE), name
    assert re.search(r"of the GPU planned +1.0 GiB +1.0 GiB", ended.out)
    weightless = project.own("base") / "transformer" / "diffusion_pytorch_model.safetensors"
    weightless.write_bytes(b"never read")
    ended = project.main("check", "pipeline.toml")
    assert ended.status == 0
    assert "of main memory" in ended.out or torch.cuda.is_available()


@pytest.mark.parametrize(("said", "size"), [("24", 24 << 30), ("24GiB", 24 << 30), ("1.5 gb", 15e8), ("80MB", 8e7)])
def test_sizes_of_memory(said: str, size: float) -> None:
    assert memory_size(said) == size


@pytest.mark.parametrize("said", ["0", "-1", "many", "24Gib/s", "24TB"])
def test_what_is_no_size_of_memory_is_told(said: str, project: Project) -> None:
    ended = project.main("check", "pipeline.toml", f"--memory={said}")
    assert ended.status == 2
    assert "write 24GiB or 24GB" in ended.err


FULL = ("--set", "backbone.train={use='full'}", "--memory", "0.5MiB")


def test_what_cannot_fit_is_refused_with_what_helps(project: Project) -> None:
    ended = project.main("check", "pipeline.toml", *FULL, "--set", "stage.soar.ema=0.9")
    assert ended.status == 2
    assert re.search(r"error: stage.soar: weights \d+ MiB, gradients .* are \d+ MiB for each process", ended.err)
    cheapest_first = (
        'stage.soar.copies = "cpu", or stage.soar.optimizer.use = "adamw8bit", or backbone.train = { use = "lora" }, '
        "or shard = true on 4 devices or more"
    )
    assert cheapest_first in ended.err


def test_how_many_devices_would_help_does_not_depend_on_how_many_there_are(project: Project) -> None:
    """Sharded gradients are not held twice, as DDP holds them."""
    one, eight = (project.main("check", "pipeline.toml", *FULL, "--ranks", n).err for n in ("1", "8"))
    assert "shard = true on 4 devices" in one
    assert "shard = true on 4 devices" in eight
    shared = ("--set", "shard=true", "--ranks")
    assert "error: stage.grpo: " in (three := project.main("check", "pipeline.toml", *FULL, *shared, "3")).err
    assert "shard = true on 6 devices" in three.err, "each has the whole decoder, which the first stage does not need"
    assert project.main("check", "pipeline.toml", *FULL, *shared, "6").status == 0


def test_activations_alone_are_a_warning(project: Project) -> None:
    ended = project.main("check", "pipeline.toml", "--memory", "0.4MiB", "--set", "data.size=[32,32]")
    assert ended.status == 0, ended.err
    assert re.search(r"soar: with what its forwards take it may not fit while .+?; what would help: ", ended.out)


def test_options_that_cannot_be_are_told_by_check(project: Project) -> None:
    ended = project.main("check", "pipeline.toml", "--set", "backbone.attention='flesh'")
    assert ended.status == 2
    assert "(did you mean 'flash'?)" in ended.err


def test_a_run_that_cannot_fit_does_not_start(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "here", staticmethod(lambda: Device("a small device", 1e5, gpu=False)))
    ended = project.main("run", "pipeline.toml")
    assert ended.status == 2
    assert "a small device has" in ended.err
    assert not (project.folder / ".corefit").exists()


def test_a_large_network_is_estimated_in_seconds_and_takes_no_memory(project: Project) -> None:
    """FLUX.1 dev itself, but for its files."""
    import json

    (project.folder / "base").unlink()
    base = tiny_flux(project.folder / "base", words=WORDS, latent_channels=16, vae_widths=(8, 8, 8, 16))
    config = base / "transformer" / "config.json"
    large = {"num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24}
    large |= {"joint_attention_dim": 4096, "pooled_projection_dim": 768, "axes_dims_rope": [16, 56, 56]}
    config.write_text(json.dumps({**json.loads(config.read_text()), **large}))
    project.swap(('use = "sd3"', 'use = "flux"'))
    settings = ["data.size=[1024,1024]", "stage.soar.micro_batch=1", "backbone.max_sequence_length=512"]
    found = of(read(project.file, settings), device=Device.of(80 << 30))
    assert found.parameters == pytest.approx(11.9e9, rel=0.01)
    assert found.activations is not None
    assert found.activations > 1 << 30


def test_of_two_experts_each_makes_a_graph_and_one_of_them_most(project: Project) -> None:
    (project.folder / "base").unlink()
    tiny_wan(project.folder / "base", words=WORDS, experts=2)
    project.swap(('use = "sd3"', 'use = "wan"'))
    two = of(read(project.file))
    (project.folder / "base").rename(project.folder / "both")
    tiny_wan(project.folder / "base", words=WORDS)
    one = of(read(project.file))
    assert two.parameters > 1.9 * one.parameters
    assert one.activations is not None
    assert two.activations == pytest.approx(one.activations, rel=0.15)
