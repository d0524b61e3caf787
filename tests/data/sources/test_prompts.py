"""Files of prompts as benchmarks publish them."""

from __future__ import annotations

import json

import pytest

from corefit.data.sources import category, prompt_source
from corefit.errors import DataError


def read(path, text):
    path.write_text(text, encoding="utf-8")
    return [(e.prompt, category(e.meta)) for e in prompt_source(path).examples()]


def test_drawbench_is_a_table_with_commas(tmp_path):
    text = 'Prompts,Category\nA red colored car.,Colors\n"One cat, one dog, ""two"" birds.",Counting\n\n'
    assert read(tmp_path / "d.csv", text) == [
        ("A red colored car.", "Colors"),
        ('One cat, one dog, "two" birds.', "Counting"),
    ]


def test_partiprompts_is_a_table_with_tabs(tmp_path):
    head = "Prompt\tCategory\tChallenge\tNote\n"
    text = head + "bond\tAbstract\tBasic\tBiology-inspired\nfive cars, red\tVehicles\tQuantity\t\n"
    assert read(tmp_path / "p.tsv", text) == [("bond", "Abstract"), ("five cars, red", "Vehicles")]


def test_geneval_has_metadata_a_line(tmp_path):
    line = {"tag": "counting", "include": [{"class": "bus", "count": 3}], "prompt": "a photo of three buses"}
    path = tmp_path / "evaluation_metadata.jsonl"
    assert read(path, json.dumps(line) + "\n") == [("a photo of three buses", "counting")]
    (example,) = prompt_source(path).examples()
    assert example.meta["include"] == [{"class": "bus", "count": 3}]


def test_hpsv2_is_a_list(tmp_path):
    assert read(tmp_path / "anime.json", '["a fox", "a hat"]') == [("a fox", ""), ("a hat", "")]
    assert read(tmp_path / "o.json", '[{"prompt": "a fox", "category": "x"}]') == [("a fox", "x")]


def test_ocr_prompts_are_lines_with_quoted_text(tmp_path):
    assert read(tmp_path / "ocr.txt", 'A sign that says "Open"\n') == [('A sign that says "Open"', "")]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.csv", "Name,Category\nx,y\n", "one of them prompt, prompts, text, caption; it has 'name', 'category'"),
        ("a.csv", "", "it has nothing"),
        ("a.tsv", "Prompt\tCategory\n", "has no prompt below its header"),
        ("a.json", '{"prompt": "x"}', "expected a list of prompts"),
        ("a.json", '["x", 3]', "entry 2 is neither a text nor an object with a 'prompt'"),
        ("a.json", '"a\n"b', "is not JSON"),
    ],
)
def test_what_is_no_list_of_prompts_is_refused(tmp_path, name, text, problem):
    with pytest.raises(DataError, match=problem):
        read(tmp_path / name, text)


def test_a_missing_file_is_refused_by_name(tmp_path):
    for name in ("a.csv", "a.json", "a.txt"):
        with pytest.raises(DataError, match=rf"{name} does not exist"):
            list(prompt_source(tmp_path / name).examples())
