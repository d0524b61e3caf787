"""Every block of code in docs/ runs, or is checked; the tutorial runs from its first line to its last."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import forks
import pytest
import quick
import scripts
import tomli_w
from conftest import Project
from PIL import Image
from processes import ended
from reading import DOCS, PAGES, Block, blocks, name, prose

from corefit.cli import cli
from corefit.cli.new import new

TUTORIAL = DOCS / "tutorial.md"
OTHERS = [page for page in PAGES if page != TUTORIAL]
KNOWN_KINDS = {"python", "toml", "sh", "text", "mermaid", "json"}


@pytest.mark.parametrize("page", [p for p in OTHERS if blocks(p, "python")], ids=name)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page run one after the other, as one module."""
    file = tmp_path / f"docs_{page.stem}.py"
    file.write_text("\n".join(block.text for block in blocks(page, "python")))
    monkeypatch.chdir(tmp_path)
    scripts.load(file)


@pytest.mark.parametrize(
    ("page", "block"),
    [pytest.param(p, b, id=f"{name(p)}-{n}") for p in OTHERS for n, b in enumerate(blocks(p, "toml"))],
)
def test_pipelines_pass_check(page: Path, block: Block, project: Project) -> None:
    """The tables of a block replace those of a small pipeline."""
    tables = {**tomllib.loads(project.text), **tomllib.loads(block.text)}
    if "data" in tables:
        tables["data"]["size"] = [16, 16]
        if tables["data"].get("source", {}).get("use") == "hf_dataset":
            _save_pairs(project.folder / tables["data"]["source"]["path"])
    project.write(tomli_w.dumps(tables))
    said = project.main("check", "pipeline.toml")
    assert said.status == 0, f"{name(page)}: {said.err}"


def _save_pairs(folder: Path) -> None:
    """Write a saved dataset with the columns of Pick-a-Pic."""
    datasets = pytest.importorskip("datasets")
    picture = io.BytesIO()
    Image.new("RGB", (16, 16)).save(picture, "png")
    pictures = [picture.getvalue()] * 8
    columns = {"caption": ["a red sky"] * 8, "jpg_0": pictures, "jpg_1": pictures, "label_0": [1.0, 0.0] * 4}
    datasets.Dataset.from_dict(columns).save_to_disk(folder)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_have_these_options(page: Path) -> None:
    lines = [line for block in blocks(page, "sh") for line in block.text.splitlines()]
    quoted = re.findall(r"`((?:torchrun|accelerate launch|corefit) [^`]*)`", prose(page))
    for line in [*lines, *quoted]:
        words = shlex.split(line, comments=True)
        if "corefit" not in words or words[0] in ("pip", "pytest"):
            continue
        command, *arguments = words[words.index("corefit") + 1 :]
        assert command in cli.commands, f"{name(page)}: {line}"
        made, top = cli.commands[command], click.Context(cli, **cli.context_settings)
        try:
            made.make_parser(click.Context(made, parent=top)).parse_args(arguments[: _end(arguments)])
        except click.UsageError as error:
            pytest.fail(f"{name(page)}: {line}: {error.message}")


def _end(arguments: list[str]) -> int:
    return next((n for n, word in enumerate(arguments) if word in (">", "|", "&&")), len(arguments))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_are_of_kinds_that_are_tested(page: Path) -> None:
    """A block without a kind, or of another kind, would not be tested."""
    fences = re.findall(r"^```(\w*)", page.read_text(), re.M)
    assert set(fences[::2]) <= KNOWN_KINDS
    assert set(fences[1::2]) <= {""}


# the tutorial


@pytest.fixture
def workshop(tmp_path: Path) -> Path:
    """A folder beside a copy of the digits example."""
    new("example", "digits", tmp_path / "digits")
    (tmp_path / "huber").mkdir()
    return tmp_path / "huber"


def test_the_tutorial_runs(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are written and its commands run in order, and the results are what the text says."""
    folder = workshop
    steps = [block for block in blocks(TUTORIAL, "python", "toml", "sh") if not block.skipped]
    assert {block.file for block in steps} == {"", "huber.py", "pipeline.toml"}
    for number, block in enumerate(steps):
        if block.file:
            (folder / block.file).write_text(block.text)
        elif block.kind == "sh":
            for line in block.text.splitlines():
                _typed(line, folder, monkeypatch)
        else:
            (folder / f"cell_{number}.py").write_text(block.text)
            monkeypatch.chdir(folder)
            scripts.load(folder / f"cell_{number}.py")
    runs = folder / "runs" / "huber"
    assert '"error":' in (runs / "01-huber" / "metrics.jsonl").read_text()
    assert (runs / "01-huber" / "model" / "model_index.json").exists()
    assert not (runs / "superseded").exists()


def _typed(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`corefit` in this process and `pytest` in a fork, for imports take seconds; everything else in a shell."""
    words = shlex.split(line, comments=True)
    if words[0] == "corefit":
        monkeypatch.chdir(folder)
        with quick.uncollected():
            cli(words[1:], standalone_mode=False)
        return
    if words[0] == "pytest":
        done = ended(forks.start("-m", *words, cwd=folder))
        assert done.status == 0, done.out + done.err
        return
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        line, shell=True, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_tutorials_file_is_short() -> None:
    text = next(block.text for block in blocks(TUTORIAL, "python") if block.file == "huber.py")
    lines = [line for line in text.splitlines() if line.strip()]
    said = re.search(r"and (\d+) lines", prose(TUTORIAL))
    assert said is not None
    assert len(lines) == int(said[1]) < 30


def test_what_the_tutorial_says_of_a_misspelling(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {block.file: block.text for block in blocks(TUTORIAL, "python", "toml") if block.file}
    for file, text in files.items():
        (workshop / file).write_text(text.replace("delta = 0.3", "dleta = 0.3"))
    monkeypatch.chdir(workshop)
    with pytest.raises(ValueError, match=r"dleta is not a key .did you mean 'delta'.*known here: delta"):
        cli(["check", "pipeline.toml"], standalone_mode=False)


def test_the_tutorials_package_has_the_files_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block: Any = next(b for b in blocks(TUTORIAL, "sh") if "corefit new objective" in b.text)
    made, entered, *_ = block.text.splitlines()
    cli(shlex.split(made)[1:], standalone_mode=False)
    folder = tmp_path / shlex.split(entered)[1]
    for file in re.findall(r"^\| `([\w./]+)` \|", prose(TUTORIAL), re.M):
        assert (folder / file).exists(), file
