"""Whole pipelines: SOAR then GRPO on a real (tiny) Stable Diffusion 3, what they leave, and going on after a stop."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quick
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from corefit.cli import main
from corefit.pipeline import Pipeline, read
from corefit.plugins import Host
from corefit.rng import Rng
from corefit.run import observers
from corefit.run.evaluation.evaluator import Evaluator
from corefit.run.report import curves
from corefit.run.run import run
from corefit.system import files, ranks, signals
from corefit.train import loop as train
from corefit.train import state

LOCAL = '''
import torch
from attrs import frozen
from corefit import hookimpl


@frozen
class Redness:
    """How red a picture is."""

    def score(self, media, prompts, meta):
        return media[:, 0].mean((1, 2)) - media[:, 1:].mean((1, 2, 3))


@hookimpl
def corefit_rewards():
    return {"redness": Redness}
'''
SPEC = """
name = "r"
plugins = ["local.py"]
precision = "fp32"

[backbone]
use = "sd3"
path = {model!r}
max_sequence_length = 12
{mode}

[data]
source = {{ use = "jsonl", path = "train.jsonl" }}
size = [16, 16]

[[stage]]
name = "soar"
steps = 4
batch = 4
objective = {{ use = "soar", points = 2 }}
optimizer = {{ lr = 1e-3 }}
log_every = 2
{extra}

[[stage]]
name = "grpo"
steps = 3
batch = 8
objective = {{ use = "flow_grpo", group = 4, steps = 4, clip = 1e-3, beta = 0.01 }}
sampler = {{ use = "flow_sde" }}
reward = [{{ use = "redness" }}]
optimizer = {{ lr = 1e-3 }}
log_every = 1
{extra}

[eval]
prompts = "heldout.jsonl"
reward = [{{ use = "redness" }}]
steps = 4
batch = 4
samples = 2
"""
pytestmark = pytest.mark.usefixtures("uncollected")
LORA = 'train = { use = "lora", rank = 4, alpha = 10 }'
"""With alpha other than rank: what reads a LoRA must scale it."""


@pytest.fixture
def spec(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a pipeline and its data; the file."""
    monkeypatch.setattr(observers, "curves", quick.blank)

    rows: list[Mapping[str, Any]] = []
    for i in range(6):
        picture = np.random.default_rng(i).integers(0, 255, (20, 24, 3), np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
        rows.append({"media": f"{i}.png", "prompt": f"a red {i}"})
    _jsonl(tmp_path / "train.jsonl", rows)
    _jsonl(tmp_path / "heldout.jsonl", [{"prompt": f"a blue {i}", "category": "ab"[i % 2]} for i in range(6)])
    (tmp_path / "local.py").write_text(LOCAL)

    def write(mode: str = "", extra: str = "") -> Path:
        (tmp_path / "p.toml").write_text(SPEC.format(model=str(checkpoint), mode=mode, extra=extra))
        return tmp_path / "p.toml"

    return write


def _jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All trained tensors of a stage."""
    files = [*folder.glob("model/transformer/*.safetensors"), *folder.glob("model/*.safetensors")]
    return {name: t for file in files for name, t in load_file(file).items()}


def equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and bool(a) and all(torch.equal(a[name], b[name]) for name in a)


def metrics(folder: Path) -> list[dict[str, float]]:
    """Logged numbers, but for those of the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("seconds", "samples_per"))} for line in lines]


def generated(pipeline: Pipeline, model: Path, prompt: str, lora: Path | None = None) -> torch.Tensor:
    """Return the sample of diffusers' own pipeline for held-out prompt 1, [1, 3, H, W] in [0, 1], from its noise."""
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(model, torch_dtype=torch.float32)
    if lora:
        pipe.load_lora_weights(lora)
    pipe.set_progress_bar_config(disable=True)
    noise = Rng((pipeline.seed, "eval"), [1]).randn((1, *pipeline.backbone.latent_shape(pipeline.data.size)))
    made = pipe(
        prompt,
        latents=noise,
        height=16,
        width=16,
        num_inference_steps=4,
        guidance_scale=4.5,
        max_sequence_length=12,
        output_type="pt",
    )
    return made.images


@pytest.mark.parametrize("mode", ["", LORA])
def test_what_a_run_leaves_and_that_diffusers_makes_the_same(spec, checkpoint, monkeypatch, mode):
    pipeline = read(spec(mode))
    monkeypatch.setattr(observers, "curves", curves)
    folder = run(pipeline)
    for name in ("00-base", "01-soar", "02-grpo"):
        assert (folder / name / "samples" / "last.png").exists()
    for name in ("01-soar", "02-grpo"):
        with Image.open(folder / name / "metrics.png") as drawn:
            assert drawn.width > 300
        model = folder / name / "model"
        made = (
            generated(pipeline, checkpoint, "a blue 1", lora=model) if mode else generated(pipeline, model, "a blue 1")
        )
        ours = run_media(pipeline, model, lora=bool(mode))
        assert float((made - ours).abs().max()) < 1e-4
    rows = json.loads((folder / "results.json").read_text())
    assert [(r["stage"], r["category"]) for r in rows if r["category"] == "all"] == [
        (stage, "all") for stage in ("base", "soar", "grpo")
    ]
    assert {"value", "low", "high", "n", "gain", "gain_low", "gain_high"} <= rows[-1].keys()
    assert (folder / "report.html").exists()
    assert (folder / "comparison.png").exists()
    again = read(folder / "pipeline.toml", host=Host())
    assert again.tables()["stage"] == pipeline.tables()["stage"]


def run_media(pipeline: Pipeline, model: Path, *, lora: bool) -> torch.Tensor:
    """The same by corefit, from the saved files."""
    from corefit.data.dataset import Dataset

    backbone = pipeline.backbone if lora else pipeline.backbone.from_saved(model)
    backbone.load(torch.device("cpu"), torch.float32)
    if lora:
        backbone.load_lora(model)
    caches = [Dataset.open(p) for p in (pipeline.folder / ".corefit" / "cache").iterdir() if (p / "done.json").exists()]
    prompts = next(c for c in caches if not c.has_media)
    assert pipeline.eval is not None
    return Evaluator(pipeline.eval, prompts, ranks.join("fp32")).media(backbone, [1])


def stopping(pipeline: Pipeline, monkeypatch, steps: Sequence[int]) -> int:
    """Run to the end, as if signals came after the given numbers of steps taken; how often it was stopped."""
    taken, stops = 0, set(steps)
    real = train.Loop.take_step

    def take_step(self, batch):
        nonlocal taken
        real(self, batch)
        taken += 1

    stopped = 0
    with monkeypatch.context() as patched:
        patched.setattr(train.Loop, "take_step", take_step)
        patched.setattr(
            signals.Signals, "stop_requested", property(lambda self: taken in stops, lambda self, value: None)
        )
        while True:
            try:
                run(pipeline)
            except train.Stopped:
                stopped += 1
                stops.discard(taken)
            else:
                return stopped


@pytest.mark.parametrize(("mode", "extra"), [("", "ema = 0.9\nmicro_batch = 3"), (LORA, "")])
def test_a_stopped_run_ends_in_the_same_bytes(spec, monkeypatch, mode, extra):
    path, quick = spec(mode, extra), ["eval.steps=1", "eval.guidance=1", "eval.limit=2"]
    whole = read(path, ["name='whole'", *quick])
    run(whole)
    parts = read(path, ["name='parts'", *quick])
    assert stopping(parts, monkeypatch, [1, 3, 5]) == 3
    for stage in ("01-soar", "02-grpo"):
        assert equal(weights(whole.run_folder / stage), weights(parts.run_folder / stage))
        assert metrics(whole.run_folder / stage) == metrics(parts.run_folder / stage)
    assert (whole.run_folder / "results.json").read_text() == (parts.run_folder / "results.json").read_text()


@pytest.mark.parametrize("mode", ["", LORA], ids=["full", "lora"])
def test_sample_grids_show_the_average_and_leave_training_as_it_is(spec, mode):
    path = spec(mode, "ema = 0.5")
    text, _, rest = path.read_text().partition('[[stage]]\nname = "grpo"')
    path.write_text(f"{text}[eval]{rest.partition('[eval]')[2]}")

    def ran(name: str, *settings: str) -> Path:
        return run(read(path, [f"name={name!r}", *settings])) / "01-soar"

    sampled, plain = ran("sampled", "stage.soar.sample_every=2"), ran("plain")
    short = ran("short", "stage.soar.steps=2")
    assert equal(weights(sampled), weights(plain))
    grids = [(folder / "samples" / "step-000002.png").read_bytes() for folder in (sampled, short)]
    assert grids == [(short / "samples" / "last.png").read_bytes()] * 2  # that of the model as it was saved
    assert (sampled / "samples" / "last.png").read_bytes() != grids[0]


METERS = ["eval.diversity={prompts=4, samples=2}", "eval.drift={samples=4, start=0.9}"]


def test_diversity_and_drift_are_in_the_run_and_are_measured_once(spec, monkeypatch):
    path = spec(LORA)
    settings = [*METERS, "eval.samples=1", "stage.soar.steps=1", "stage.grpo.steps=1", "stage.soar.optimizer.lr=1e-2"]
    folder = run(read(path, settings))
    rows = [row for row in json.loads((folder / "results.json").read_text()) if row["metric"] in ("vendi", "distance")]
    assert {(row["stage"], row["metric"], row["category"], row["n"]) for row in rows} == {
        (stage, metric, category, n)
        for stage in ("base", "soar", "grpo")
        for metric in ("vendi", "distance")
        for category, n in (("all", 4), ("a", 2), ("b", 2))
    }
    assert all(1 <= row["value"] <= 2 for row in rows if row["metric"] == "vendi")
    for name in ("00-base", "01-soar", "02-grpo"):  # of six prompts, the best and worst beside the first
        with safe_open(folder / name / "samples" / "extremes.safetensors", "numpy") as kept:
            assert (kept.metadata(), len(kept.get_tensor("media"))) == ({"rows": "[1, 2, 3, 4, 5]"}, 5)
    written = {name: folder / name / "drift.json" for name in ("00-base", "01-soar", "02-grpo")}
    base, soar, grpo = (files.read_json(path) for path in written.values())
    assert 0 < base["drift"][0] < base["drift"][-1]
    assert base["sigmas"] == soar["sigmas"]
    assert base["sigmas"][0] < 0.9
    assert soar["change"] == pytest.approx(np.array(soar["drift"]) - base["drift"])
    assert grpo["change"] == pytest.approx(np.array(grpo["drift"]) - soar["drift"])
    assert max(map(abs, soar["change"])) > 1e-6
    before = {name: path.read_bytes() for name, path in written.items()}
    results = (folder / "results.json").read_bytes()
    written["01-soar"].unlink()

    def again(*args: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Evaluator, "media", again)
    monkeypatch.setattr(Evaluator, "drift", again)
    run(read(path, settings))
    assert {name: path.read_bytes() for name, path in written.items()} == before
    assert (folder / "results.json").read_bytes() == results


def test_finished_stages_are_used_as_they_are(spec, monkeypatch):
    path = unjudged(spec())
    folder = run(read(path))
    before = weights(folder / "02-grpo")
    with monkeypatch.context() as patched:
        patched.setattr(train, "train", lambda *_: pytest.fail("a finished stage was trained again"))
        run(read(path, ["stage.soar.log_every=1"]))
    soar = (folder / "01-soar" / "done.json").read_text()
    run(read(path, ["stage.grpo.optimizer.lr=5e-4"]))
    assert (folder / "01-soar" / "done.json").read_text() == soar
    assert not equal(weights(folder / "02-grpo"), before)
    assert equal(weights(folder / "superseded" / "02-grpo-1"), before)


def unjudged(path: Path) -> Path:
    """The pipeline without [eval]."""
    path.write_text(path.read_text().partition("[eval]")[0])
    return path


SFT = ["stage.soar.objective={use='sft'}", "stage.soar.checkpoint_every=3", "stage.grpo.steps=1"]


def test_a_damaged_model_is_trained_again_to_the_same_bytes(spec):
    """Full, then a LoRA on it: the second stage stays, for what it starts from is what it was."""
    path = unjudged(spec())
    settings = [*SFT, "stage.grpo.train={use='lora', rank=4}"]
    folder = run(read(path, settings))
    file = folder / "01-soar" / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    whole, done = file.read_bytes(), (folder / "02-grpo" / "done.json").stat().st_mtime_ns
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    run(read(path, settings))
    assert file.read_bytes() == whole
    assert (folder / "02-grpo" / "done.json").stat().st_mtime_ns == done
    assert not (folder / "superseded").exists()


def test_a_stage_that_was_stopped_and_then_changed_starts_at_step_0(spec, monkeypatch):
    path, first = unjudged(spec()), []
    real = state.State.resume

    def resume(self, keep):
        real(self, keep)
        first.append((self.stage, self.step))

    monkeypatch.setattr(state.State, "resume", resume)
    monkeypatch.setattr(signals.Signals, "stop_requested", property(lambda self: True, lambda self, value: None))
    for settings in (SFT, SFT, [*SFT, "stage.soar.optimizer.lr=5e-4"]):
        with pytest.raises(train.Stopped):
            run(read(path, settings))
    assert first == [("soar", 0), ("soar", 1), ("soar", 0)]
    assert (path.parent / "runs/r/superseded/01-soar-1/checkpoints/step-000002").is_dir()


def test_sft_is_one_word(spec):
    path = unjudged(spec())
    soar, *_ = path.read_text().rpartition("[[stage]]")
    path.write_text(soar.replace('use = "soar", points = 2', 'use = "sft"'))
    folder = run(read(path))
    assert weights(folder / "01-soar")
    assert [line["step"] for line in metrics(folder / "01-soar")] == [2, 4]


def test_a_lora_after_full_training_is_one_on_that_stages_model(spec):
    pipeline = read(spec(), ["stage.grpo.train={use='lora', rank=4}", "eval.limit=2"])
    folder = run(pipeline)
    assert all("lora" in name for name in weights(folder / "02-grpo"))
    made = generated(pipeline, folder / "01-soar" / "model", "a blue 1", lora=folder / "02-grpo" / "model")
    pipeline.backbone = pipeline.backbone.from_saved(folder / "01-soar" / "model")
    ours = run_media(pipeline, folder / "02-grpo" / "model", lora=True)
    assert float((made - ours).abs().max()) < 1e-4


@pytest.mark.parametrize("after", ["{use='full'}", "{use='lora', rank=8}"])
def test_a_lora_is_not_dropped_by_the_next_stage(spec, after):
    from corefit.errors import ConfigError

    with pytest.raises(ConfigError, match=r"stage\.grpo\.train: .* the LoRA of stage soar"):
        read(spec(LORA), [f"stage.grpo.train={after}"])


def test_two_runs_do_not_share_a_folder(spec):
    from corefit.errors import ConfigError

    pipeline = read(spec())
    pipeline.run_folder.mkdir(parents=True)
    import fcntl

    with (pipeline.run_folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is running in"):
            run(pipeline)


def test_a_full_disk_costs_a_sentence_and_what_was_being_written(project, monkeypatch):
    """At each kind of file in turn: the same command goes on, and ends as if nothing had been."""
    command = ("run", "pipeline.toml", "--set", "precision='fp32'")
    opened, synced = Path.open, files.sync
    for full in ("pipeline.toml", "metrics.jsonl", "model", "done.json", "scores.json", "results.json", "report.html"):

        def refuse(path: Path, full: str = full) -> None:
            if path.name in (full, f".{full}.part", f".partial-{full}"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def open_(path: Path, mode: str = "r", *args: Any, full: str = full, **keys: Any) -> Any:
            if mode[0] in "wa":
                refuse(path, full)
            return opened(path, mode, *args, **keys)

        def sync(path: Path, full: str = full) -> None:
            refuse(path, full)
            synced(path)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "open", open_)
            patched.setattr(files, "sync", sync)
            ended = project.main(*command)
        if full == "report.html":  # what only describes a run does not stop it
            assert ended.status == 0
            assert "report.html cannot be kept up to date (OSError: [Errno 28]" in ended.out
            continue
        assert ended.status == 2, full
        assert re.fullmatch(
            r"error: .*runs/tiny.* cannot be written: No space left.*; make room there, .*", ended.err.strip()
        )
    ended = project.main(*command)
    assert ended.status == 0, ended.err
    folder = project.folder / "runs" / "tiny"
    assert not (folder / "superseded").exists()
    assert (folder / "report.html").exists()
    lines = (folder / "02-grpo" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]


SIGNAL = """
import os
from corefit import hookimpl


@hookimpl
def corefit_step_finished(stage, state, metrics):
    os.kill(os.getpid(), int(os.environ["SIGNAL"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_checkpoint(spec, number, monkeypatch, capsys):
    """The command itself, in this process; it comes while step 2 is logged."""
    path = unjudged(spec())
    path.write_text(path.read_text().replace('["local.py"]', '["local.py", "stop.py"]'))
    (path.parent / "stop.py").write_text(SIGNAL)
    monkeypatch.setenv("SIGNAL", str(int(number)))
    monkeypatch.setattr(sys, "argv", ["corefit", "run", str(path), "--set", "stage.soar.steps=100000"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 130
    assert "the same command continues" in said.err
    assert "Traceback" not in said.err + said.out
    checkpoints = path.parent / "runs" / "r" / "01-soar" / "checkpoints"
    assert [checkpoint.name for checkpoint in checkpoints.iterdir()] == ["step-000002"]
