"""A trigger word: before each caption that lacks it, in place of a caption that is missing, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Project, write_lines
from PIL import Image
from test_cache import Toy

from corefit.data.cache import key, prepare
from corefit.data.dataset import Dataset
from corefit.data.settings import Data
from corefit.data.sources import ImageFolder, Jsonl
from corefit.errors import DataError
from corefit.pipeline.eval import Eval
from corefit.types import Example


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four pictures: two with captions, one with a blank one, one without."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (8, 8), (number * 60, 0, 0)).save(folder / f"{number}.png")
    for number, text in enumerate(("a cat", "photo of ohwx, smiling", " \n")):
        (folder / f"{number}.txt").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a cat", "ohwx man, a cat"),
        ("  a cat\n", "ohwx man, a cat"),
        ("ohwx man, a cat", "ohwx man, a cat"),
        ("a photo of ohwx man", "a photo of ohwx man"),
        ("a photo of ohwx manly", "ohwx man, a photo of ohwx manly"),
        ("Ohwx man", "ohwx man, Ohwx man"),  # tokenizers of T5 tell them apart
        ("", "ohwx man"),
        (" ", "ohwx man"),
        (("a cat", "the ohwx man"), ("ohwx man, a cat", "the ohwx man")),
    ],
)
def test_it_stands_before_each_caption_that_lacks_it(caption: str | tuple[str, ...], expected: str | tuple[str, ...]):
    data = Data(source=ImageFolder(Path()), trigger="ohwx man")
    assert data.triggered(Example(caption)).prompt == expected


def test_a_trigger_may_have_signs():
    data = Data(source=ImageFolder(Path()), trigger="<s1>+")
    assert data.triggered(Example("a <s1>+ cat")).prompt == "a <s1>+ cat"
    assert data.triggered(Example("a <s1> cat")).prompt == "<s1>+, a <s1> cat"


def test_without_one_captions_are_as_they_were():
    example = Example(" a cat\n")
    assert Data(source=ImageFolder(Path())).triggered(example) is example


def test_it_is_what_is_encoded(pictures: Path, tmp_path: Path):
    data = Data(source=ImageFolder(pictures), size=(8, 8), trigger="ohwx")
    toy = Toy()
    prepare(data, toy, tmp_path / "cache", media=True)
    assert sorted(toy.prompts) == ["ohwx", "ohwx, a cat", "photo of ohwx, smiling"]


def test_its_own_class_prompt_stays(pictures: Path):
    data = Data(source=ImageFolder(pictures, class_prompt="a {folder}"), trigger="ohwx")
    assert [data.triggered(each).prompt for each in data.raw_source.examples()][-1] == "ohwx, a pictures"


def test_without_one_a_missing_caption_is_refused(pictures: Path):
    with pytest.raises(DataError, match=r"1 of 4 media have no \.txt file"):
        list(Data(source=ImageFolder(pictures)).raw_source.examples())


def test_it_is_part_of_the_cache_key(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    file = write_lines(tmp_path / "train.jsonl", {"media": "1.png", "prompt": "a cat"})

    def keyed(trigger: str | None) -> str:
        return key(Data(source=Jsonl(file), size=(8, 8), trigger=trigger), Toy(), tmp_path / "cache", media=True)

    assert len({keyed(None), keyed("ohwx"), keyed("sks")}) == 3
    assert keyed("cat") == keyed(None), "every caption has it, so nothing is encoded again"


def test_the_empty_prompt_of_guidance_and_dropout_stays_empty(pictures: Path, tmp_path: Path):
    toy = Toy()
    data = Data(source=ImageFolder(pictures), size=(8, 8), trigger="ohwx")
    found = Dataset.open(prepare(data, toy, tmp_path / "cache", media=True), None, None)
    for name, tensor in toy.null(1).tensors.items():
        assert torch.equal(found.null.tensors[name], tensor)


def test_prompts_of_eval_are_as_written():
    assert Eval(prompts=("a cat",)).data((8, 8)).trigger is None


@pytest.mark.parametrize("trigger", ["", " ", " ohwx", "a  b", "a\nb"])
def test_a_word_that_cannot_be_one_is_refused(trigger: str):
    with pytest.raises(ValueError, match="'trigger' must be a word, or words with single spaces"):
        Data(source=ImageFolder(Path()), trigger=trigger)


def test_it_does_not_go_with_encoded_data(project: Project):
    project.swap(('source = { use = "jsonl", path = "train.jsonl" }', 'encoded = "cache"\ntrigger = "ohwx"'))
    ended = project.main("check", "pipeline.toml")
    assert ended.status == 2
    assert "'trigger' applies to raw examples" in ended.err
