"""Results as CSV and Markdown: nothing is lost or added, and names stay names."""

from __future__ import annotations

import csv
import io

import pytest

from corefit.run.report import Scores, results
from corefit.run.report.export import csv_text, markdown

HALF, MOST = [0.0, 1.0] * 10, [0.0, 1.0, 1.0, 1.0] * 5
CATEGORIES = ["one", "a|b"] * 10


def scores(stage: str, values: list[float], start: str = "") -> Scores:
    return Scores(
        stage, {"judge": values, "pick": [20 + v for v in values]}, CATEGORIES, units={"judge": "share"}, start=start
    )


CHAIN = results([scores("base", HALF), scores("soar", MOST, "base")])
BRANCHES = results([scores("base", HALF), scores("soar", MOST, "base"), scores("sft", HALF, "base")])


def test_csv_has_every_key_of_every_row_to_the_last_digit():
    read = list(csv.DictReader(io.StringIO(csv_text(BRANCHES))))
    assert len(read) == len(BRANCHES) == 3 * 2 * 3
    for line, row in zip(read, BRANCHES, strict=True):
        assert {key: text for key, text in line.items() if text} == {k: str(v) for k, v in row.items() if v != ""}


def test_csv_of_nothing_is_its_header():
    assert csv_text([]).splitlines() == [",".join(csv.DictReader(io.StringIO(csv_text(CHAIN))).fieldnames or [])]
    assert markdown([]) == ""


def test_markdown_has_a_table_for_each_metric():
    judge, pick = markdown(CHAIN).rstrip("\n").split("\n\n**pick**")
    assert judge.splitlines()[:4] == [
        "**judge**, 20 held-out prompts, 95 % intervals",
        "",
        r"| stage | all | one | a\|b | paired gain |",
        "|---|---:|---:|---:|---:|",
    ]
    base, soar = judge.splitlines()[4:]
    assert base.startswith("| base | 50.0 % (")
    assert base.endswith("| - |")
    assert "| 75.0 % (" in soar
    assert "| +25.0 pp (" in soar
    assert "| 20.5" in pick
    assert "%" not in pick.split("\n", 1)[1]


def test_markdown_of_branches_names_the_starts():
    head, _, base, soar, sft = markdown(BRANCHES).split("\n\n")[1].splitlines()
    assert head.endswith("| starts from | gain over it | gain over base |")
    assert [line.split(" | ")[-3] for line in (base, soar, sft)] == ["-", "base", "base"]


@pytest.mark.parametrize("name", ["a|b", "<b>x</b>", "[x](y)", "*x*", "`x`", "two\nlines"])
def test_a_name_is_no_markup(name):
    rows = results([Scores(name, {"judge": HALF})])
    lines = markdown(rows).splitlines()
    assert len(lines) == 5
    assert len({line.replace("\\|", "").count("|") for line in lines[2:]}) == 1
    assert "<b>" not in lines[-1].replace("\\<", "")
