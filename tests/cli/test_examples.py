"""`corefit new example`: a copy of an example that runs where it lies."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest
from conftest import Project

from corefit.cli import examples

ROOT = Path(__file__).parents[2]


def test_digits_is_copied_and_checked_where_it_lies(project: Project):
    ended = project.main("new", "example", "digits")
    assert (ended.status, ended.err) == (0, "")
    said = f"digits: {examples.EXAMPLES['digits']}"
    assert ended.out.splitlines() == [said, "next:", "  cd digits && corefit run"]
    copy, original = project.folder / "digits", ROOT / "examples/digits"
    files = {file.relative_to(copy).as_posix() for file in copy.rglob("*") if file.is_file()}
    assert files == {*examples.example("digits")}
    assert {"base/vae/diffusion_pytorch_model.safetensors", "heldout.jsonl", "README.md"} < files
    assert filecmp.cmpfiles(copy, original, files, shallow=False) == (list(files), [], [])
    checked = project.main("check", "digits/pipeline.toml")
    assert checked.status == 0, checked.err
    assert checked.out.startswith("digits/pipeline.toml: ok: soar (300 steps of 64), grpo (75 steps of 128)")


def test_the_plugin_goes_to_a_folder_that_is_named(project: Project):
    ended = project.main("new", "example", "plugin", "--folder", "my plugin")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.splitlines()[2:] == ["  cd 'my plugin' && pip install -e '.[test]'", "  pytest"]
    assert (project.folder / "my plugin/tests/test_reflexflow.py").is_file()


def test_what_digits_needs_is_installed_first(project: Project, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(examples.importlib.util, "find_spec", lambda name: None)
    ended = project.main("new", "example", "digits")
    assert ended.out.splitlines()[2:] == ["  pip install 'corefit[examples]'", "  cd digits && corefit run"]


def test_what_runs_and_tools_left_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(examples, "_folder", lambda: tmp_path)
    wanted = {"digits.py", "base/model_index.json"}
    made = {"runs/digits/run.json", ".corefit/cache/x.mds", "__pycache__/digits.pyc", "evals/a/b", ".hidden"}
    for name in wanted | made:
        (tmp_path / "digits" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "digits" / name).write_text("")
    assert {*examples.example("digits")} == wanted


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["digit"], "there is no example 'digit' (did you mean 'digits'?); there are: digits, plugin"),
        (["digits", "--folder", "media"], "media exists already; nothing was written"),
        (["../digits"], "there is no example '../digits'"),
    ],
)
def test_a_copy_that_cannot_be_is_refused(project: Project, args: list[str], said: str):
    before = project.tree()
    ended = project.main("new", "example", *args)
    assert (ended.status, ended.out) == (2, "")
    assert said in ended.err
    assert project.tree() == before
