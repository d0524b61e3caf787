"""`corefit new pipeline NAME --from-folder PICTURES`: what it chooses, that it runs, and what it refuses."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from conftest import Project, write_lines
from PIL import Image

from corefit.cli.starting import choice as chosen
from corefit.cli.starting.choice import Choice
from corefit.cli.starting.fitting import ROOM, Fitting
from corefit.cli.starting.survey import Survey, survey
from corefit.cli.starting.text import quoted
from corefit.data.sources import video
from corefit.errors import ConfigError, DataError
from corefit.train import estimate
from corefit.train.estimate import Device, Estimate

SHAPES = ((48, 32), (32, 48), (32, 32), (40, 40))
COLORS = ("red", "green", "blue")


@pytest.fixture
def drawn(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of so many pictures, of several sizes, with captions unless captions=False."""

    def draw(count: int = 40, shapes: Sequence[tuple[int, int]] = SHAPES, captions: bool = True) -> Path:
        folder = tmp_path / "pictures"
        folder.mkdir()
        for number in range(count):
            color = COLORS[number % 3]
            Image.new("RGB", shapes[number % len(shapes)], color).save(folder / f"{number:02}.png")
            if captions:
                (folder / f"{number:02}.txt").write_text(f"a {color} sky, picture {number}")
        return folder

    return draw


def made(project: Project, *args: str) -> dict[str, Any]:
    """The tables of a pipeline that is written, and passes `corefit check`."""
    ended = project.main("new", "pipeline", "mine", "--from-folder", "pictures", "--model", "base", *args)
    assert (ended.status, ended.err) == (0, "")
    file = project.folder / "mine/pipeline.toml"
    checked = project.main("check", "--gpu", "24GiB", "mine/pipeline.toml")
    assert checked.status == 0, checked.err
    return tomllib.loads(file.read_text())


def refused(project: Project, *args: str) -> str:
    before = project.tree()
    ended = project.main("new", "pipeline", "mine", "--from-folder", "pictures", "--model", "base", *args)
    assert (ended.status, ended.out) == (2, "")
    assert project.tree() == before, "nothing is written"
    return ended.err


# what it writes


def test_it_runs(project: Project, drawn: Callable[..., Path]):
    drawn()
    tables = made(project, "--gpu", "24GiB", "--trigger", "ohwx")
    assert tables["backbone"] == {"use": "sd3", "path": "../base", "train": {"use": "lora", "rank": 16}}
    assert tables["data"]["source"] == {"use": "imagefolder", "path": "../pictures"}
    assert (tables["data"]["size"], set(tables["data"]["aspects"])) == ([16, 16], {"1:1", "3:2", "2:3"})
    assert tables["data"]["trigger"] == "ohwx"
    (stage,) = tables["stage"]
    assert stage["objective"]["use"] == "sft"
    assert (stage["batch"], stage["micro_batch"]) == (4, 4)
    prompts = tables["eval"]["prompts"]
    assert prompts[:2] == ["ohwx, a red sky, picture 0", "ohwx, a blue sky, picture 5"]
    assert [prompt for prompt in prompts if "ohwx" not in prompt] == prompts[-1:]
    settings = ("stage.sft.steps=2", "eval.steps=2")
    ended = project.main("run", "mine/pipeline.toml", *(arg for each in settings for arg in ("--set", each)))
    assert ended.status == 0, ended.err
    assert list((project.folder / "mine/runs/mine/01-sft/model").glob("*.safetensors"))


def test_it_says_what_it_chose_and_what_to_do_next(project: Project, drawn: Callable[..., Path]):
    drawn()
    ended = project.main("new", "pipeline", "mine", "--from-folder", "pictures", "--model", "base", "--gpu", "24GiB")
    lines = ended.out.splitlines()
    assert lines[:3] == [
        "mine/pipeline.toml is written",
        "40 pictures, 40 with captions: a LoRA of rank 16 for sd3 (base)",
        "size 16 x 16 in 3 shapes; 750 steps of 4, so each picture is seen about 75 times",
    ]
    assert re.fullmatch(r"A step takes about \d+ MiB of 24.0 GiB \(the GPU planned\) without gradient .*", lines[3])
    assert lines[-4:] == [
        "next:",
        "  corefit check --gpu 24GiB mine/pipeline.toml",
        "  corefit run mine/pipeline.toml",
        "  corefit sample mine/runs/mine/01-sft 'a red sky, picture 0'",
    ]


def test_every_choice_is_explained(project: Project, drawn: Callable[..., Path]):
    drawn()
    made(project, "--gpu", "24GiB")
    lines = (project.folder / "mine/pipeline.toml").read_text().splitlines()
    assert max(map(len, lines)) <= 120
    for key in ("train", "source", "size", "aspects", "encode_batch", "steps", "batch", "micro_batch", "optimizer"):
        (number,) = [n for n, line in enumerate(lines) if line.startswith(f"{key} = ")][:1]
        assert lines[number - 1].startswith("# "), key
    assert (project.folder / "mine/pipeline.schema.json").is_file()


def test_the_other_objective_is_one_comment_away(project: Project, drawn: Callable[..., Path]):
    drawn(8)
    assert made(project, "--objective", "soar")["stage"][0]["objective"]["use"] == "soar"
    file = project.folder / "mine/pipeline.toml"
    lines = [line for line in file.read_text().splitlines() if not line.startswith("objective = ")]
    file.write_text("\n".join(line.removeprefix("# ") if "# objective = " in line else line for line in lines))
    assert tomllib.loads(file.read_text())["stage"][0]["objective"]["use"] == "sft"
    assert project.main("check", "mine/pipeline.toml").status == 0


def test_a_list_of_pictures_is_read(project: Project, drawn: Callable[..., Path]):
    folder = drawn(captions=False)
    rows = [{"file_name": file.name, "text": f'a "{file.stem}"\n\x7f'} for file in sorted(folder.iterdir())]
    write_lines(folder / "metadata.jsonl", *rows)
    tables = made(project)
    assert tables["data"]["source"] == {
        "use": "jsonl", "path": "../pictures/metadata.jsonl", "media": "file_name", "prompt": "text"
    }  # fmt: skip
    assert tables["eval"]["prompts"][0] == 'a "00"\n\x7f'


def test_without_captions_the_trigger_is_the_prompt(project: Project, drawn: Callable[..., Path]):
    folder = drawn(12, captions=False)
    (folder / "00.txt").write_text("a cat")
    tables = made(project, "--trigger", "ohwx")
    assert tables["eval"]["prompts"] == [text.format("ohwx") for text in chosen.AROUND]
    text = (project.folder / "mine/pipeline.toml").read_text()
    assert "11 without a caption, whose prompt is the trigger word" in text


@pytest.mark.parametrize("suffix", [".txt", ".caption"])
def test_captions_of_several_lines_are_several(drawn: Callable[..., Path], suffix: str):
    folder = drawn(captions=False)
    for file in sorted(folder.glob("*.png")):
        file.with_suffix(suffix).write_text("a cat\nan animal")
    found = survey(folder, None)
    assert found.captions[0] == ("a cat", "an animal")
    assert found.source["captions"] == "lines"
    assert found.source.get("prompt_suffix", ".txt") == suffix
    (folder / "00.txt").write_text("")
    if suffix == ".txt":
        assert "captions" not in survey(folder, "ohwx").source, "lines refuse a file without any"


def test_subfolders_and_what_is_not_read_are_told(drawn: Callable[..., Path]):
    folder = drawn(8)
    (folder / "more").mkdir()
    for file in [*folder.glob("0[0-2].*")]:
        file.rename(folder / "more" / file.name)
    (folder / "new.HEIC").write_bytes(b"")
    several, unread = survey(folder, None).notes
    assert several == "they are in 2 folders, and all are read (.: 5, more: 3)"
    assert unread == "not read: 1 .heic; convert them to PNG or JPEG"


def test_a_model_that_is_not_at_hand(project: Project, drawn: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    drawn(shapes=[(1200, 800)])
    ended = project.main("new", "pipeline", "mine", "--from-folder", "pictures", "--gpu", "24GiB")
    assert (ended.status, ended.err) == (0, "")
    assert "the model could not be looked at: stabilityai/stable-diffusion-3.5-medium: no such folder" in ended.out
    text = (project.folder / "mine/pipeline.toml").read_text()
    tables = tomllib.loads(text)
    assert (tables["data"]["size"], tables["stage"][0]["micro_batch"]) == ([512, 512], 1)
    assert tables["backbone"]["gradient_checkpointing"] is True
    assert "`corefit check --gpu 24GiB` says whether it fits" in " ".join(text.replace("\n#", "").split())


@pytest.mark.parametrize("text", ['a "b" \\ c', "tab\t", "\x7f\x01", "é 猫", "a\nb"])
def test_text_is_quoted_as_toml(text: str):
    assert tomllib.loads(f"a = {quoted(text)}") == {"a": text}


# what it refuses


def test_bad_folders_are_refused(project: Project, drawn: Callable[..., Path]):
    assert "--from-folder pictures: no such folder" in refused(project)
    folder = drawn(0)
    assert "holds no media" in refused(project)
    (folder / "a.heic").write_bytes(b"")
    assert "convert these to PNG or JPEG:\n  a.heic" in refused(project)
    for number in range(3):
        Image.new("RGB", (32, 32)).save(folder / f"{number}.png")
    assert "none of the media has a caption" in refused(project)
    (folder / "0.txt").write_text("a cat")
    said = refused(project)
    assert "2 of 3 media have no caption: write each in a text file, 1.txt beside 1.png; or give the word" in said
    assert "--trigger ohwx\n  pictures/1.png" in said
    assert "there are only 3 pictures" in refused(project, "--trigger", "ohwx")
    assert "'trigger' must be a word" in refused(project, "--trigger", " ")


def test_bad_pictures_are_refused(project: Project, drawn: Callable[..., Path]):
    folder = drawn(6)
    (folder / "05.png").write_bytes(b"no picture")
    said = refused(project)
    assert "1 of 6 media cannot be read; repair them, or remove them from the folder:\n  pictures/05.png" in said
    Image.new("RGB", (500, 32)).save(folder / "05.png")
    said = refused(project)
    assert "1 of 6 are more than 4 times as long as wide" in said
    assert "pictures/05.png: 500 x 32" in said


def test_pictures_that_are_too_small_are_refused(project: Project, drawn: Callable[..., Path]):
    drawn(6, [(9, 9)])
    assert "the pictures are too small: a quarter of them have at most 81 pixels" in refused(project)


def test_two_sets_of_captions_are_refused(project: Project, drawn: Callable[..., Path]):
    folder = drawn(6)
    write_lines(folder / "train.jsonl", {"media": "00.png", "prompt": "a cat"})
    said = refused(project)
    assert "pictures has captions in train.jsonl and 6 .txt files beside pictures" in said
    assert "--from-folder pictures/train.jsonl" in said


def test_media_that_a_list_lacks_are_refused(project: Project, drawn: Callable[..., Path]):
    folder = drawn(6, captions=False)
    write_lines(folder / "train.jsonl", *({"media": f"{n:02}.png", "prompt": "a cat"} for n in range(7)))
    assert "1 of 7 media cannot be read" in refused(project)
    write_lines(folder / "train.jsonl", {"media": "00.png"})
    assert "none of the media has a caption" in refused(project), "the list is of something else"


def test_clips_are_told_from_pictures(project: Project, drawn: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    folder = drawn(6)
    (folder / "clip.mp4").write_bytes(b"")
    (folder / "clip.txt").write_text("a cat")
    assert "there are 6 pictures and 1 clip, and a model is trained on one kind" in refused(project)
    for file in folder.glob("*.png"):
        file.rename(file.with_suffix(".mp4"))
    monkeypatch.setitem(sys.modules, "av", None)
    assert "video files are read with PyAV: pip install 'corefit[video]'" in refused(project)


def test_models_are_refused(project: Project, drawn: Callable[..., Path]):
    drawn(6)
    assert "there is no such folder here; if it is a name on the hub, say of which family" in refused(
        project, "--model", "some/model"
    )
    assert "no backbone is called 'sd33' (did you mean 'sd3'?)" in refused(project, "--backbone", "sd33")
    assert "is a StableDiffusion3Pipeline" in refused(project, "--backbone", "flux")
    said = refused(project, "--gpu", "1MiB")
    assert "this model does not fit into 1 MiB (the GPU planned), of which 10% must stay free" in said


def test_an_objective_of_another_kind_is_refused(project: Project, drawn: Callable[..., Path]):
    drawn(0)
    assert "--objective nft: sft, soar learn from a folder" in refused(project, "--objective", "nft")


def test_options_that_nothing_would_read_are_refused(project: Project, drawn: Callable[..., Path]):
    drawn(0)
    ended = project.main("new", "pipeline", "mine", "--gpu", "24GiB")
    assert (ended.status, "--gpu goes with --from-folder" in ended.err) == (2, True)
    ended = project.main("new", "reward", "mine", "--from-folder", "pictures")
    assert (ended.status, "--from-folder is for pipelines" in ended.err) == (2, True)
    assert not (project.folder / "mine").exists()


def test_nothing_is_overwritten(project: Project, drawn: Callable[..., Path]):
    drawn(0)
    (project.folder / "mine").mkdir()
    (project.folder / "mine/a").write_text("")
    assert "mine exists already; nothing was written" in refused(project)


# how it chooses


@pytest.mark.parametrize(
    ("count", "expected"), [(5, (4, 150, 16)), (20, (4, 500, 16)), (200, (8, 800, 16)), (10_000, (32, 1400, 32))]
)
def test_more_pictures_are_seen_less_often(count: int, expected: tuple[int, int, int]):
    assert chosen.plan(count) == expected
    batch, steps, _ = chosen.plan(10**6)
    assert batch * steps >= 10**6, "each is seen once"


def of(*sizes: tuple[int, int], frames: Sequence[tuple[int, float]] = ()) -> Survey:
    return Survey(source={}, sizes=sizes, captions=[("a cat",)] * len(sizes), frames=frames)


def test_the_size_enlarges_few_pictures():
    large, small = [(1100, 1000)] * 76, [(600, 600)] * 24
    assert chosen.sides(of(*large, *small), 1024, None)[0] == 1024
    assert chosen.sides(of(*large, *small, *small), 1024, None)[0] == 512
    assert chosen.sides(of(*large), 768, None)[0] == 768, "no more than the model makes"


def test_buckets_are_those_that_enough_pictures_have():
    many = [(1000, 1500)] * 60 + [(1000, 1000)] * 46
    assert chosen.aspects(of(*many, *[(1600, 900)] * 4), (512, 512), 4, None) == ("3:2", "1:1")
    assert chosen.aspects(of(*many, *[(1600, 900)] * 8), (512, 512), 4, None) == ("3:2", "1:1", "9:16")
    assert chosen.aspects(of(*[(1000, 1010)] * 9), (512, 512), 4, None) == ()
    assert chosen.aspects(of(*[(900, 1600)] * 9), (512, 512), 4, None) == ("16:9",)


def test_cropping_is_counted():
    assert chosen.cropped(of((100, 200), (100, 100)), ()) == pytest.approx(0.25)
    assert chosen.cropped(of((100, 200), (100, 100)), ("1:1", "2:1")) == 0


def test_clips_have_as_many_frames_as_the_shortest():
    sizes = [(480, 832)] * 2
    assert chosen.frames(of(*sizes, frames=[(50, 12.0), (90, 12.0)])) == ([49, 33, 25, 17, 13, 9, 5], None)
    assert chosen.frames(of(*sizes, frames=[(50, 32.0), (90, 30.0)])) == ([25, 17, 13, 9, 5], 16)
    with pytest.raises(DataError, match="the shortest clip has 3 frames"):
        chosen.frames(of(*sizes, frames=[(3, 12.0), (90, 12.0)]))


def test_the_length_of_a_clip_is_read(tmp_path: Path):
    (tmp_path / "clip").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 4)).save(tmp_path / f"clip/{number}.png")
    assert video.clip_shape(tmp_path / "clip") == (4, 8, 3, 0.0)
    frames = [Image.new("RGB", (8, 4), (shade, 0, 0)) for shade in range(0, 250, 50)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=100)
    pytest.importorskip("av")
    assert video.clip_shape(tmp_path / "clip.gif") == (4, 8, 5, 10.0)


def test_clips_without_a_rate_are_not_sampled():
    assert chosen.frames(of((480, 832), frames=[(20, 0.0)])) == ([17, 13, 9, 5], None)


GIB = float(1 << 30)


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (15, (1024, 8, False)),
        (10, (1024, 4, False)),
        (8, (1024, 2, False)),
        (7, (1024, 1, False)),
        (6.5, (1024, 4, True)),
        (6, (1024, 2, True)),
        (5.65, (512, 2, True)),
    ],
)
def test_as_much_as_fits(monkeypatch: pytest.MonkeyPatch, memory: float, expected: tuple[int, int, bool]):
    """Weights of 5 GiB; a row of 1024 takes 1 GiB, with gradient checkpointing 1/8, and of 512 a fourth of that."""
    monkeypatch.setattr(Fitting, "_can_recompute", lambda self, choice: True)
    monkeypatch.setattr(Fitting, "_with_keys", lambda self, choice: None)

    def found(each: Choice, device: Device, graphs: bool = True) -> list[Estimate]:
        row = GIB * (each.size[0] / 1024) ** 2 / (8 if each.recompute else 1)
        zero = {"gradients": 0.0, "optimizer": 0.0, "exchanged": 0.0, "copies": 0.0, "gathered": 0.0}
        activations = int(row * each.micro) if graphs else None
        return [Estimate(stage="a", parameters=1, trainable=1, weights=5 * GIB, activations=activations, **zero)]

    monkeypatch.setattr(estimate, "estimates", found)
    fitting = Fitting(Device.of(memory * GIB), lambda choice: choice)  # pyright: ignore[reportArgumentType]
    large = Choice(size=(1024, 1024), batch=8, steps=1, rank=1)
    fitted = fitting.fit([large, evolve(large, size=(512, 512))])
    assert (fitted.choice.size[0], fitted.choice.micro, fitted.choice.recompute) == expected
    assert fitted.estimate is not None
    assert fitted.estimate.total <= ROOM * memory * GIB
    with pytest.raises(ConfigError, match=r"does not fit into 5.0 GiB .* takes 5.0 GiB \(weights 5.0 GiB\); name a"):
        Fitting(Device.of(5 * GIB), lambda choice: choice).fit([large])  # pyright: ignore[reportArgumentType]
