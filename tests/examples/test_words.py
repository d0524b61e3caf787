"""The words of the study: parts that share none, pictures that OCR reads, a pipeline that is accepted."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import scripts
import torch
from conftest import Project

from corefit.errors import DataError
from corefit.plugins import Host

HERE = Path(__file__).parents[2] / "examples" / "study" / "words"


def load(name: str):
    return scripts.load(HERE / f"{name}.py")


words = load("words")


def word(example) -> str:
    return example.prompt.split('"')[1]


def made(count: int, **keys) -> list:
    return list(words.Words(count, **keys).examples())


def rows(part: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / f"{part}.jsonl").read_text().splitlines()]


def test_a_picture_depends_on_the_seed_and_its_number_alone():
    few, more, other = made(20, seed=3), made(25, seed=3), made(20, seed=4)
    assert all((a.media == b.media).all() and a.prompt == b.prompt for a, b in zip(few, more, strict=False))
    assert sum(a.prompt == b.prompt for a, b in zip(few, other, strict=True)) < 5


def test_no_word_is_in_two_parts_and_all_are_listed():
    every = (HERE / "english.txt").read_text().split()
    parts = [words.english(part) for part in words.PARTS]
    assert sorted(word for part in parts for word in part) == sorted(every)
    assert len(set(every)) == len(every)
    assert min(map(len, parts)) > 150
    assert {len(word) for word in every} == {*words.LENGTHS}


def test_held_out_words_are_spelled_with_pairs_of_letters_that_training_shows():
    known = words.pairs(words.english("train"))
    for part in ("validation", "heldout"):
        assert words.pairs(words.english(part)) <= known


@pytest.mark.parametrize("kind", ["english", "made up"])
def test_the_source_shows_no_held_out_word(kind):
    shown = {word(example) for example in islice(words.Words(300, kind=kind).examples(), 300)}
    assert len(shown) > 150
    assert not shown & {*words.english("validation"), *words.english("heldout")}
    assert (kind == "english") == bool(shown & {*words.english("train")})
    assert words.pairs(shown) <= words.pairs(words.english("train"))


@pytest.mark.parametrize("part", ["validation", "heldout"])
def test_the_files_of_prompts_hold_each_word_as_often_as_any_other(part, tmp_path, monkeypatch):
    asked = [row["prompt"].split('"')[1] for row in rows(part)]
    count = len(words.english(part))
    for start in range(0, len(asked), count):
        assert sorted(asked[start : start + count]) == [*words.english(part)]
    listed = [*words.prompts(part)]
    assert rows(part) == listed


@pytest.mark.parametrize("font", words.FONTS)
def test_every_word_fits_wherever_it_is_moved(font):
    for text in words.english("heldout")[::8]:
        for move in (-words.MOVED, words.MOVED):
            picture = words.draw(text, font, move, move)
            paper = (picture == words.PAPER).all(2)
            edges = [paper[0], paper[-1], paper[:, 0], paper[:, -1]]
            assert all(edge.all() for edge in edges), text
            assert not paper.all()


def test_clean_words_are_read_right_in_each_font_and_others_are_not():
    pytest.importorskip("rapidocr_onnxruntime")
    ocr = Host().get("rewards", "ocr")(detect=False, strict=True, threads=1)
    examples = [example for font in words.FONTS for example in made(3, seed=5, fonts=(font,))]
    media = torch.from_numpy(np.stack([example.media for example in examples])).permute(0, 3, 1, 2) / 255
    prompts = [example.prompt for example in examples]
    meta = [{}] * len(prompts)
    assert ocr.score(media, prompts, meta).mean() > 0.95
    assert ocr.score(media, prompts[1:] + prompts[:1], meta).mean() == 0


def test_a_missing_font_is_named_with_its_key(monkeypatch):
    monkeypatch.setitem(words.FONTS, "sans", "NoSuchFont")
    words.sized.cache_clear()
    with pytest.raises(DataError, match=r"'sans' is missing: .* NoSuchFont\.ttf; .* 'fonts'"):
        words.draw("lamp", "sans")


@pytest.fixture(scope="module")
def blank(tmp_path_factory):
    """The base before training, and its folder."""
    folder = tmp_path_factory.mktemp("words") / "blank"
    return load("make_words_base").blank(folder), folder


def test_the_pipeline_is_accepted(project: Project, blank):
    checked = project.main("check", str(HERE.parent / "words.toml"), "--set", f"backbone.path={blank[1]}")
    assert checked.status == 0, checked.err
    assert "sft_compute (426 steps of 64, from base), soar (100 steps of 64, from base)" in checked.out


def test_no_prompt_is_cut_and_t5_sees_letters(blank):
    longest = sys.modules["make_words_base"].TEXT_LENGTH
    for row in rows("heldout"):
        letters = len(row["prompt"]) - len('the word ""')
        assert len(blank[0].tokenizer_3(row["prompt"]).input_ids) == 2 + 2 + letters + 1 <= longest
        assert len(blank[0].tokenizer(row["prompt"]).input_ids) <= longest
