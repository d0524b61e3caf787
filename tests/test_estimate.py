"""What a stage needs of memory: the numbers of a really loaded network, and what autograd really keeps."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, Project

from benchmarks.activations import Activations
from corefit import Condition, weights
from corefit.estimate import Estimate, estimates
from corefit.pipeline import Pipeline, read
from corefit.testing import tiny_chroma, tiny_flux, tiny_sd3, tiny_wan

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


def of(pipeline: Pipeline, stage: int = 0, **keys: Any) -> Estimate:
    return estimates(pipeline, **{"half": False, **keys})[stage]


def measured(pipeline: Pipeline, rows: int) -> int:
    """Bytes that one real forward keeps."""
    backbone: Any = pipeline.backbone
    x, sigma = torch.randn(rows, *backbone.latent_shape(pipeline.data.size)), torch.full((rows,), 0.5)
    cond = backbone.encode_text(["a red sky"] * rows)
    activations = Activations.of(backbone.transformer)
    with activations.watch():
        v = backbone.velocity(x, sigma, Condition(cond.tensors))
    assert v.requires_grad
    return activations.peak


@pytest.mark.parametrize("train", ["{use='full'}", "{use='lora', rank=3}"])
def test_it_is_what_a_loaded_network_is(family: Pipeline, train: str) -> None:
    pipeline = read(family.folder / "pipeline.toml", [f"backbone.train={train}", *_SAME])
    found, backbone = of(pipeline), pipeline.backbone
    backbone.load(torch.device("cpu"), torch.float32)
    named = weights.trainable(backbone, pipeline.mode(pipeline.stage[0]))
    parameters = sum(p.numel() for p in backbone.transformer.parameters())
    trained = sum(p.numel() for p in named.values())
    assert (found.parameters, found.trainable) == (parameters, trained)
    assert found.weights == 4 * parameters
    assert (found.gradients, found.optimizer) == (4 * trained, 8 * trained)
    assert found.activations == pytest.approx(measured(pipeline, 2), rel=0.15)


_SAME = ("data.size=[32,32]", "stage.soar.micro_batch=2")


def test_shards_share_and_copies_cost(project: Project) -> None:
    plain = of(read(project.file, ["backbone.train={use='full'}"]))
    shared = of(read(project.file, ["backbone.train={use='full'}", "shard=true", "stage.soar.ema=0.9"]), world=4)
    assert shared.certain == pytest.approx((plain.certain + 4 * plain.trainable) / 4)
    assert shared.activations is not None
    assert plain.activations is not None
    assert shared.activations < plain.activations  # a quarter of the rows each


def test_half_keeps_what_does_not_train_in_two_bytes(project: Project) -> None:
    pipeline = read(project.file)
    whole, half = of(pipeline), of(pipeline, half=True)
    frozen = whole.parameters - whole.trainable
    assert whole.weights - half.weights == 2 * frozen


def test_checkpointing_keeps_less(project: Project) -> None:
    (project.folder / "base").unlink()
    tiny_sd3(project.folder / "base", words=WORDS, layers=8)
    plain, less = (of(read(project.file, [f"backbone.gradient_checkpointing={on}"])) for on in ("false", "true"))
    assert plain.activations is not None
    assert less.activations is not None
    assert less.activations < 0.4 * plain.activations
    assert less.certain == plain.certain


def test_check_says_it_and_reads_no_weights(project: Project) -> None:
    ended = project.main("check", "pipeline.toml", "--memory", "1")
    assert ended.status == 0, ended.err
    line = next(line for line in ended.out.splitlines() if line.startswith("  soar: "))
    assert re.search(r"parameters, .* train; weights .* gradients .* optimizer .* activations about .* of 1 GiB", line)
    weightless = project.own("base") / "transformer" / "diffusion_pytorch_model.safetensors"
    weightless.write_bytes(b"never read")
    assert project.main("check", "pipeline.toml").status == 0


def test_what_cannot_fit_is_refused_with_what_helps(project: Project) -> None:
    full = ("--set", "backbone.train={use='full'}", "--memory", "0.0001")
    ended = project.main("check", "pipeline.toml", *full)
    assert ended.status == 2
    assert "error: stage.soar: weights, gradients and optimizer take" in ended.err
    assert 'train = { use = "lora" }, or shard = true on' in ended.err


def test_a_run_that_cannot_fit_does_not_start(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corefit.estimate.capacity", lambda: (1e5, "a small device"))
    ended = project.main("run", "pipeline.toml")
    assert ended.status == 2
    assert "take" in ended.err
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
    found = of(read(project.file, settings), half=True)
    assert found.parameters == pytest.approx(11.9e9, rel=0.01)
    assert found.activations is not None
    assert found.activations > 1 << 30


def test_of_two_experts_one_makes_the_graph(project: Project) -> None:
    (project.folder / "base").unlink()
    tiny_wan(project.folder / "base", words=WORDS, experts=2)
    project.swap(('use = "sd3"', 'use = "wan"'))
    two = of(read(project.file))
    (project.folder / "base").rename(project.folder / "both")
    tiny_wan(project.folder / "base", words=WORDS)
    one = of(read(project.file))
    assert two.parameters > 1.9 * one.parameters
    assert two.activations == one.activations
