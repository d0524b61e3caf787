"""The checks that every source must pass, and tests of this one."""

from __future__ import annotations

from pathlib import Path

import pytest

from corefit.errors import DataError
from corefit.testing import check_source
from corefit_plugin_name import PluginName


def source(folder: Path, text: str, **columns: str) -> PluginName:
    (folder / "train.csv").write_text(text, encoding="utf-8")
    return PluginName(folder / "train.csv", **columns)


def test_it_is_a_source(tmp_path: Path):
    (tmp_path / "1.png").write_bytes(b"a picture")
    check_source(source(tmp_path, "prompt,media,year\na red circle,1.png,1999\n"))


def test_every_line_is_an_example(tmp_path: Path):
    text = 'caption,file,year\n"red, round",1.png,1999\n\nblue,2.png,2001\n'
    first, second = source(tmp_path, text, prompt="caption", media="file").examples()
    assert (first.prompt, first.media, dict(first.meta)) == ("red, round", tmp_path / "1.png", {"year": "1999"})
    assert second.media == tmp_path / "2.png"


def test_prompts_alone(tmp_path: Path):
    assert [example.media for example in source(tmp_path, "prompt\nred\nblue\n").examples()] == [None, None]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no lines"),
        ("prompt,media\n", "has no lines"),
        ("text\nred\n", "train.csv:2: there is no column 'prompt'; there are: text"),
        ("prompt,media\nred\n", "train.csv:2: the line has more or fewer columns"),
        ("prompt,media\nred,1.png,3\n", "train.csv:2: the line has more or fewer columns"),
        ("prompt,media\nred,1.png\nblue,\n", "train.csv:3: 'media' is empty"),
        ('prompt\nred\n"blue\n', "no CSV in UTF-8"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, text: str, said: str):
    with pytest.raises(DataError, match=said):
        list(source(tmp_path, text).examples())


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"none\.csv does not exist"):
        list(PluginName(tmp_path / "none.csv").examples())
