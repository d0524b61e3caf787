"""The archives that are published: what is in them, what the package index shows, and that the wheel alone suffices."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
from attrs import frozen
from reading import ROOT, blocks

import corefit
from corefit.cli.examples import EXAMPLES, example
from corefit.cli.new import TEMPLATES, UNWANTED

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REPOSITORY = PROJECT["project"]["urls"]["Repository"]
LINK = re.compile(r"\]\(([^)]*)\)")


@frozen
class Built:
    """The wheel, and the wheel that comes out of the source archive, in whose examples somebody has worked."""

    wheel: Path
    again: Path

    @property
    def names(self) -> set[str]:
        return {*zipfile.ZipFile(self.wheel).namelist()}

    @property
    def metadata(self) -> Message:
        (name,) = (name for name in self.names if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(zipfile.ZipFile(self.wheel).read(name))


def build(root: Path, target: Path, *kinds: str) -> Path:
    """Build archives and return their folder."""
    command = [sys.executable, "-m", "hatchling", "build", *(f"-t{kind}" for kind in kinds), "-d", str(target)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("archives")
    both = build(ROOT, folder / "built", "sdist", "wheel")
    with tarfile.open(*both.glob("*.tar.gz")) as archive:
        archive.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    for left in ("runs/digits/run.json", ".corefit/cache/shard.mds", "__pycache__/digits.pyc", "evals/a/scores.json"):
        (source / "examples/digits" / left).parent.mkdir(parents=True)
        (source / "examples/digits" / left).write_text("{}")
    again = build(source, folder / "again", "wheel")
    return Built(*both.glob("*.whl"), *again.glob("*.whl"))


def test_the_source_archive_makes_the_same_wheel_and_no_runs_are_in_it(built: Built) -> None:
    first, second = (
        {file.filename: file.CRC for file in zipfile.ZipFile(wheel).infolist()} for wheel in (built.wheel, built.again)
    )
    assert first == second


def test_everything_that_is_read_at_run_time_is_in_the_wheel(built: Built) -> None:
    package = ROOT / "corefit"
    data = {
        f"corefit/{file.relative_to(package).as_posix()}"
        for folder in (TEMPLATES, package / "run/report/page/assets")
        for file in folder.rglob("*")
        if file.is_file() and not UNWANTED & {*file.parts}
    }
    examples = {f"corefit/examples/{name}/{file}" for name in EXAMPLES for file in example(name)}
    assert len(data) > 25
    assert data | examples <= built.names
    assert {name for name in built.names if name.startswith("corefit/examples/")} == examples


def test_every_package_in_the_wheel_has_types(built: Built) -> None:
    packages = {name.split("/")[0] for name in built.names if re.match(r"corefit(_\w+)?/", name)}
    points = PROJECT["project"]["entry-points"]["corefit"].values()
    assert packages == {point.split(".")[0] for point in points}
    assert {f"{package}/py.typed" for package in packages} <= built.names


def test_the_index_page_has_no_relative_link(built: Built) -> None:
    shown = str(built.metadata.get_payload())
    links = LINK.findall(shown)
    assert [link for link in links if not re.match("https?://", link)] == []
    assert len(links) == len(LINK.findall((ROOT / "README.md").read_text())) > 30
    assert built.metadata["Description-Content-Type"] == "text/markdown"


def test_what_the_index_page_links_to_is_in_the_repository(built: Built) -> None:
    """The address of the repository is written once, in [project.urls]; the substitutions repeat it."""
    shown = str(built.metadata.get_payload())
    ours = [link.removeprefix(REPOSITORY) for link in LINK.findall(shown) if link.startswith(REPOSITORY)]
    assert len(ours) > 20
    for link in ours:
        path = re.sub(r"^(/(blob|raw)/main/|#.*)", "", link).partition("#")[0]
        assert (ROOT / path).exists(), link
    urls = dict(url.split(", ") for url in built.metadata.get_all("Project-URL", []))
    assert all(url.startswith(REPOSITORY) for url in urls.values())
    assert {"Repository", "Documentation", "Changelog", "Issues"} <= {*urls}
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", shown)
    assert pictures
    assert all(picture.startswith(f"{REPOSITORY}/raw/") for picture in pictures)


@frozen
class Wheel:
    """The wheel, installed into a folder of its own, and used from an empty one."""

    folder: Path

    @property
    def empty(self) -> Path:
        return self.folder / "empty"

    def type(self, line: str, folder: str = ".") -> str:
        """Run what is typed in a shell, and return what it prints."""
        paths = os.pathsep.join([str(self.folder / "bin"), os.environ.get("PATH", "")])
        environment = {**os.environ, "PYTHONPATH": str(self.folder / "site"), "PATH": paths}
        done = subprocess.run(
            line, shell=True, cwd=self.empty / folder, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def wheel(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(built.wheel) as archive:
        archive.extractall(folder / "site")
    for made in ("empty", "bin"):
        (folder / made).mkdir()
    for name in ("corefit", "pytest"):
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {name} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    return Wheel(folder)


def test_the_wheel_alone_has_all_plugins_and_the_example(wheel: Wheel) -> None:
    listed = wheel.type("corefit plugins --trace")
    assert listed.count(f"(corefit {corefit.__version__})") > 30
    assert str(ROOT) not in listed
    assert "cd digits && corefit run" in wheel.type("corefit new example digits")
    assert (wheel.empty / "digits/base/vae/diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.slow
def test_the_wheel_alone_runs_the_example(wheel: Wheel) -> None:
    """A short run of the main job."""
    wheel.type("corefit new example digits --folder short")
    few = ("data.source.count=256", "eval.limit=64", *(f"stage.{stage}.steps=5" for stage in ("soar", "grpo")))
    said = wheel.type(f"corefit run {' '.join(f'--set {one}' for one in few)}", "short")
    assert "all of it is in" in said
    assert (wheel.empty / "short/runs/digits/report.html").is_file()


@pytest.mark.slow
def test_the_wheel_alone_is_enough_for_the_tutorial_and_the_example_plugin(wheel: Wheel) -> None:
    wheel.type("mkdir -p workshop/huber")
    wheel.type("corefit new example digits", "workshop")
    folder = wheel.empty / "workshop/huber"
    for block in blocks(ROOT / "docs/tutorial.md", "python", "toml", "sh"):
        if block.file:
            (folder / block.file).write_text(block.text)
        elif block.kind == "sh" and not block.skipped:
            for line in block.text.splitlines():
                wheel.type(line, "workshop/huber")
    assert (folder / "runs/huber/report.html").is_file()
    wheel.type("corefit new example plugin")
    assert "passed" in wheel.type("pytest -q -p no:cacheprovider", "plugin")
