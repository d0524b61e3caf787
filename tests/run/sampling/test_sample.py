"""`corefit sample`, as it is typed: the pictures of a run once more, from stages, folders and LoRAs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Project
from PIL import Image
from safetensors.numpy import load_file

from corefit.run.evaluation.evaluator import LAST, SAMPLES
from corefit.run.sampling.pictures import in_words, place, write
from corefit.run.sampling.subject import Request, find

RUN = """
[[stage]]
name = "full"
steps = 1
batch = 4
train = { use = "full" }
objective = { use = "sft" }

[[stage]]
name = "lora"
steps = 1
batch = 4
train = { use = "lora", rank = 4 }
objective = { use = "sft" }
optimizer = { lr = 0.1 }

[[stage]]
name = "more"
steps = 1
batch = 4
train = { use = "full" }
objective = { use = "sft" }
from = "full"

[eval]
prompts = "heldout.jsonl"
steps = 2
seed = 7
guidance = 3.0
samples = 3
"""
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def ran(checkpoint, pictures, tmp_path_factory) -> Path:
    """A run with a stage of all weights, a LoRA on it, and one that has not finished; not to be changed."""
    from conftest import PIPELINE, fill

    from corefit.pipeline import read
    from corefit.run.run import run

    folder = tmp_path_factory.mktemp("ran")
    fill(folder, checkpoint, pictures).write_text(PIPELINE.partition("\n[[stage]]\n")[0] + RUN)
    run(read(folder / "pipeline.toml"))
    shutil.rmtree(folder / "runs/tiny/03-more/model")
    return folder


@pytest.fixture
def at(project: Project, ran: Path) -> Project:
    """The project with that run in it."""
    (project.folder / "runs").symlink_to(ran / "runs")
    shutil.copy(ran / "pipeline.toml", project.file)
    return project


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture)


def of_run(ran: Path, stage: str) -> np.ndarray:
    """What the run has drawn of its first prompts, [n, H, W, 3]."""
    return load_file(ran / "runs/tiny" / stage / "samples" / SAMPLES)["media"].transpose(0, 2, 3, 1)


def test_held_out_prompts_give_the_pictures_of_the_run(at, ran):
    ended = at.main("sample", "runs/tiny/02-lora", "a blue sky", "another", "--base", "--n", "2")
    assert ended.status == 0, ended.err
    assert ended.out.splitlines()[-1] == "all of it is in samples/tiny-02-lora"
    made = at.folder / "samples/tiny-02-lora"
    stems = [f"{words}-seed{seed}" for words in ("1-a-blue-sky", "2-another") for seed in (7, 8)]
    names = [f"{stem}{beside}.png" for stem in stems for beside in ("", "-base")]
    assert sorted(file.name for file in made.iterdir()) == sorted([*names, "comparison.png"])
    assert (pixels(made / f"{stems[0]}.png") == of_run(ran, "02-lora")[2]).all()
    assert (pixels(made / f"{stems[0]}-base.png") == of_run(ran, "00-base")[2]).all()
    assert len({pixels(made / name).tobytes() for name in names}) == len(names), "each is another picture"
    with Image.open(made / f"{stems[1]}.png") as picture:
        assert (picture.info["prompt"], picture.info["seed"]) == ("a blue sky", "8")
        assert picture.info["model"] == "tiny/02-lora"
        settings = json.loads(picture.info["settings"])
    assert {"backbone": "sd3", "size": [16, 16], "guidance": 3.0, "steps": 2, "row": 2}.items() <= settings.items()
    assert str(at.folder) not in json.dumps(picture.info), "nothing tells of this machine"


def test_a_file_of_prompts_is_sampled_in_the_order_of_evaluation(at, ran):
    ended = at.main("sample", "runs/tiny/01-full/model", "--prompts", "heldout.jsonl", "--out", "all", "--batch", "3")
    assert ended.status == 0, ended.err
    found = sorted((at.folder / "all").glob("*-seed7.png"))
    assert [file.name[:2] for file in found] == [f"{n}-" for n in range(1, 7)]
    for file, theirs in zip(found, of_run(ran, "01-full"), strict=False):
        assert (pixels(file) == theirs).all()
    with Image.open(at.folder / "all/grid.png") as grid:
        assert grid.width > 100


def test_folders_and_loras_outside_of_a_run(at, ran):
    shutil.copytree(ran / "runs/tiny/01-full/model", at.folder / "whole")
    shutil.copytree(ran / "runs/tiny/02-lora/model", at.folder / "lora")
    shutil.copy(at.folder / "lora" / LORA, at.folder / "mine.safetensors")
    lora, full = of_run(ran, "02-lora")[0], of_run(ran, "01-full")[0]

    def drawn(model: str, *args: str) -> np.ndarray:
        (at.folder / "one.png").unlink(missing_ok=True)
        ended = at.main("sample", model, "a red sky", "--out", "one.png", *args)
        assert (ended.status, ended.out.splitlines()[-1:]) == (0, ["it is one.png"]), ended.err
        return pixels(at.folder / "one.png")

    pipeline = ("--pipeline", "pipeline.toml")
    assert (drawn("whole", *pipeline) == full).all()
    assert (drawn("mine.safetensors", "--on", "whole", *pipeline) == lora).all()
    assert (drawn("lora", "--on", "whole", *pipeline) == lora).all()
    assert (drawn(f"runs/tiny/02-lora/model/{LORA}") == lora).all()
    assert (drawn("mine.safetensors", *pipeline) != lora).any(), "on the pipeline's base it is another model"
    usual = ("--size", "16", "--steps", "2", "--seed", "7")  # without a pipeline: prompts of the family's usual length
    found = [drawn("whole", *usual), drawn("lora", "--on", "whole", *usual), drawn("lora", "--on", "base", *usual)]
    assert len({each.tobytes() for each in found}) == 3


def test_what_guidance_leads_away_from_changes_the_picture(at):
    for name, args in {"plain": (), "away": ("--negative", "a green sea")}.items():
        assert at.main("sample", "runs/tiny/00-base", "a red sky", "--out", f"{name}.png", *args).status == 0
    assert (pixels(at.folder / "plain.png") != pixels(at.folder / "away.png")).any()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("runs/tiny/02-lora",), "name the prompts"),
        (("runs/tiny/02-lora", "x", "--prompts", "heldout.jsonl"), "name the prompts"),
        (("runs/tiny/02-lora", " "), "a prompt is empty"),
        (("runs/tiny/02-lora", "--prompts", "none.txt"), "does not exist"),
        (("runs/tiny", "x"), "is a run; name one of its stages"),
        (("runs/tiny/03-more", "x"), "'more' of .* has not finished"),
        (("runs/tiny/02-lor", "x"), "did you mean 'lora'"),
        (("runs/tiny/02-lora", "x", "--pipeline", "pipeline.toml"), "leave out --pipeline"),
        (("runs/tiny/00-base", "x", "--base"), "leave --base out"),
        (("runs/tiny/02-lora", "x", "--out", "base"), "nothing is overwritten; name another folder"),
        (("runs/tiny/02-lora", "x", "--out", "media/0.png"), "nothing is overwritten; name another file"),
        (("runs/tiny/02-lora", "x", "y", "--out", "new.png"), "there are 2 pictures; name a folder"),
        (("runs/tiny/02-lora", "x", "--negative", "y", "--guidance", "1"), "raise --guidance"),
        (("runs/tiny/02-lora", "x", "--size", "17"), "must be a multiple of 4"),
        (("runs/tiny/02-lora", "x", "--size", "1,2,3,4"), "is no size; write HEIGHT,WIDTH"),
        (("nothing", "x"), "there is no nothing; name a stage"),
        (("train.jsonl", "x"), "is a file, and no LoRA"),
        (("media", "x"), "has neither a model_index.json nor a LoRA"),
        (("base", "x", "--on", "base"), "is a whole model; leave it out"),
        (("base", "x", "--backbone", "sd4", "--size", "16"), "did you mean 'sd3'"),
        (("base", "x", "--backbone", "sd3", "--pipeline", "pipeline.toml"), "has one; leave it out"),
        (("lone.safetensors", "x"), "is a LoRA; name what it goes on"),
        (("strange", "x"), "is a Sd4Pipeline, and the backbones here are: .*sd3"),
        (("damaged", "x"), "does not say which family it is"),
    ],
)
def test_what_cannot_be_sampled_is_said(at, args, words):
    (at.folder / "lone.safetensors").write_bytes(b"")
    for name, text in {"strange": '{"_class_name": "Sd4Pipeline"}', "damaged": "["}.items():
        (at.folder / name).mkdir()
        (at.folder / name / "model_index.json").write_text(text)
    before = at.tree()
    ended = at.main("sample", *args)
    assert ended.status == 2
    assert "Traceback" not in ended.err
    assert re.search(words, ended.err), ended.err
    assert at.tree() == before, "nothing is written"


def test_running_out_of_memory_and_being_stopped(at, monkeypatch):
    def fail(error: BaseException):
        def generate(*args, **keys):
            raise error

        monkeypatch.setattr("corefit.run.sampling.sample.generate", generate)

    fail(MemoryError())
    ended = at.main("sample", "runs/tiny/02-lora", "x", "--batch", "4")
    assert ended.status == 2
    assert "sampling: out of memory" in ended.err
    assert "--batch 2 (now 4), or a --size smaller than 16,16" in ended.err
    fail(KeyboardInterrupt())
    ended = at.main("sample", "runs/tiny/02-lora", "x")
    assert (ended.status, ended.err.splitlines()[-1]) == (130, "stopped; 0 pictures done")


def test_weights_are_held_as_the_run_held_them(at):
    """Under bf16: LoRAs on the base or on rounded weights in bfloat16; weights saved in float32 stay in it."""

    def half(model: str) -> bool:
        return find(Request(str(run / model), ("x",))).subject.half

    run = at.folder / "again" / "run"
    shutil.copytree(at.folder / "runs/tiny", run, ignore=shutil.ignore_patterns("checkpoints", "*.safetensors"))
    assert [half(stage) for stage in ("00-base", "01-full", "02-lora")] == [False, False, False]
    text = (run / "pipeline.toml").read_text()
    (run / "pipeline.toml").write_text(text.replace('save_dtype = "fp32"', 'save_dtype = "bf16"', 1))
    assert [half(stage) for stage in ("01-full", "02-lora")] == [False, True]


def test_the_trigger_word_and_lost_prompts_are_told(at, ran):
    folder = at.folder / "again" / "run"
    shutil.copytree(ran / "runs/tiny", folder, ignore=shutil.ignore_patterns("checkpoints"))
    text = (folder / "pipeline.toml").read_text().replace("[data]", '[data]\ntrigger = "ohwx"')
    lines = ("prompts = 'gone.txt'" if line.startswith("prompts") else line for line in text.splitlines())
    (folder / "pipeline.toml").write_text("\n".join(lines))
    ended = at.main("sample", "again/run/00-base", "a red sky", "Ohwx in a red sky")
    assert ended.status == 0, ended.err
    assert "1 prompt without 'ohwx', the pipeline's trigger word" in ended.out
    assert "the file of [eval] prompts is gone" in ended.out


def test_usual_settings_are_the_family_s_and_the_size_that_of_the_checkpoint(checkpoint):
    found = find(Request(str(checkpoint), ("x",)))
    assert (found.kind, found.settings.eval.guidance, found.settings.eval.steps) == ("sd3", 4.5, 40)
    latents = json.loads((checkpoint / "transformer/config.json").read_text())["sample_size"]
    assert found.settings.size == (2 * latents, 2 * latents)


def test_a_clip_is_an_animation_that_says_how_it_was_made(tmp_path):
    import torch

    clip = torch.linspace(0, 1, 5).reshape(1, 5, 1, 1).expand(3, 5, 8, 8)
    write(clip, tmp_path / "clip.webp", {"prompt": "a red sky", "seed": 3})
    with Image.open(tmp_path / "clip.webp") as animation:
        assert animation.n_frames == 5  # pyright: ignore[reportAttributeAccessIssue]
        told = json.loads(animation.getexif()[0x010E])
    assert (told["prompt"], told["seed"]) == ("a red sky", 3)


def test_names_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert in_words("A red, RED bus/../") == "a-red-red-bus"
    assert in_words("日本の空") == "日本の空"
    assert in_words("?!") == "picture"
    assert len(in_words("東" * 100).encode()) <= 40
    assert place(None, "digits/02-grpo", 3) == Path("samples/digits-02-grpo")
    Path("samples/digits-02-grpo").mkdir(parents=True)
    assert place(None, "digits/02-grpo", 3) == Path("samples/digits-02-grpo-2")


def test_the_sheet_of_a_stage_is_not_touched(at, ran):
    """Samples go beside the working folder, never into a run."""
    before = (ran / "runs/tiny/01-full/samples" / LAST).stat().st_mtime_ns
    assert at.main("sample", "runs/tiny/01-full", "x").status == 0
    assert (ran / "runs/tiny/01-full/samples" / LAST).stat().st_mtime_ns == before
