"""The hostile harness can fail: what it must notice, it notices."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.hostile.case import Case, Project, changed, digests
from benchmarks.hostile.command import AREAS, every_case
from benchmarks.hostile.play import advice, ending

CASE = Case(name="seed is text", area="pipeline", says=("seed",))


def test_cases_are_many_in_every_area_and_of_unique_names():
    cases = every_case()
    assert len(cases) >= 200
    assert {case.area for case in cases} == set(AREAS)


@pytest.mark.parametrize(
    ("status", "said", "wrong"),
    [
        (2, "error: seed: must be a whole number", []),
        (0, "ok", ["status 0, not 2: ok"]),
        (2, "error: no", ["does not say 'seed': error: no"]),
        (None, "", ["hangs: killed after 120 s"]),
    ],
)
def test_status_and_words(status: int | None, said: str, wrong: list[str]):
    assert ending(CASE, status, said) == wrong


def test_a_traceback_is_wrong_unless_it_is_a_plugin_authors_own():
    said = 'seed\nTraceback (most recent call last):\n  File "odd.py", line 1\nValueError: mine'
    theirs = Case(name="raises", area="rewards", says=("seed",), theirs="odd.py")
    assert any("Traceback" in reason for reason in ending(CASE, 2, said))
    assert ending(theirs, 1, said) == []
    assert ending(theirs, 1, said.replace("odd.py", "other.py"))


def test_files_of_the_users_that_go_or_change_or_come(tmp_path: Path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("1")
    before = digests(tmp_path)
    (tmp_path / "a").write_text("2")
    (tmp_path / "b").unlink()
    (tmp_path / "c").write_text("1")
    assert changed(before, digests(tmp_path)) == ["b: gone", "a: changed", "c: new"]
    assert changed(before, digests(tmp_path), makes=["c"]) == ["b: gone", "a: changed"]


def test_advice_to_delete_what_is_the_users(tmp_path: Path):
    project = Project(tmp_path)
    assert advice("Delete pictures; it is then made again", project) == [f"advises to delete {tmp_path / 'pictures'}"]
    assert advice(f"Delete {project.cache / '0123456789abcdef'}; it is then made again", project) == []
    assert advice("remove the key", project) == []
