"""What several tests need: a tiny SD3 checkpoint, a few pictures, and a project folder to spoil."""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: pytest-xdist's workers share the cores
import numpy as np
import pytest
import quick
from attrs import frozen
from PIL import Image

pytest_plugins = ["stores"]
quick.without_waiting_for_the_disk()
SIZE = 16
COLOURS: Mapping[str, tuple[int, int, int]] = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}
WORDS = ("a", "picture", "of", "sky", "sea", *COLOURS)
PIPELINE = """\
name = "tiny"
plugins = ["bright.py"]

[backbone]
use = "sd3"
path = "base"
max_sequence_length = 16
train = { use = "lora", rank = 2 }

[data]
source = { use = "jsonl", path = "train.jsonl" }
size = [16, 16]

[[stage]]
name = "soar"
steps = 2
batch = 4
objective = { use = "soar", points = 2 }
noise = { use = "logit_normal" }
optimizer = { lr = 1e-3 }

[[stage]]
name = "grpo"
steps = 1
batch = 4
objective = { use = "flow_grpo", group = 2, steps = 4 }
sampler = { use = "flow_sde", noise = 0.7 }
reward = [{ use = "bright", weight = 1.0 }]

[eval]
prompts = "heldout.jsonl"
reward = [{ use = "bright" }]
steps = 2
limit = 4
"""
"""SOAR, then Flow-GRPO, on what `project` holds."""
BRIGHT = '''\
"""A reward in a local file: how bright a picture is."""

from __future__ import annotations

from attrs import frozen

from corefit import Offers, Reward, hookimpl


@frozen
class Bright(Reward):
    """Mean of all pixels times `gain`."""

    gain: float = 1.0

    def score(self, media, prompts, meta):
        return media.flatten(1).mean(1) * self.gain


@hookimpl
def corefit_rewards() -> Offers[Reward]:
    return {"bright": Bright}
'''


def pytest_collection_finish() -> None:
    """Tests and what they import stay to the end: no garbage is looked for in them."""
    gc.freeze()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 3 folder, 16 pixels a side; not to be changed by tests."""
    from corefit.testing.checkpoints import tiny_sd3

    quick.ready()
    return tiny_sd3(tmp_path_factory.mktemp("sd3") / "base", words=WORDS)


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Runs of the test are `quick.uncollected`, as those of `Project.main` always are."""
    with quick.uncollected():
        yield


@pytest.fixture(scope="session")
def dataset(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A dozen pictures, encoded."""
    from training import prepared

    return prepared(checkpoint, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def job(checkpoint: Path, dataset: Any, tmp_path: Path, uncollected: None) -> Callable[..., Any]:
    """Makes a stage's training, each in a folder of its own: job(objective, mode, **keys of the stage)."""
    from training import job_of

    number = itertools.count(1)
    return lambda *args, **keys: job_of(checkpoint, dataset, tmp_path / f"stage-{next(number)}", *args, **keys)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl (8 pictures in media/), heldout.jsonl (6 prompts, 2 categories); not to be changed by tests."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "media").mkdir()
    names, rows = list(COLOURS), []
    for number in range(8):
        colour, noise = names[number % 3], np.random.default_rng(number).integers(-30, 30, (SIZE, SIZE, 3))
        pixels = (np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "media" / f"{number}.png")
        rows.append({"prompt": f"a picture of a {colour} sky", "media": f"media/{number}.png", "number": number})
    held = [
        {"prompt": f"a {c} {thing}", "category": thing}
        for thing, colours in (("sky", names), ("sea", names))
        for c in colours
    ]
    write_lines(folder / "train.jsonl", *rows)
    write_lines(folder / "heldout.jsonl", *held)
    return folder


def write_lines(path: Path, *rows: Any) -> Path:
    """A JSON Lines file; rows that are text are written as they are."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@frozen
class Ended:
    """How a command ended, and what it said."""

    status: int
    out: str
    err: str


@frozen
class Project:
    """A folder with a checkpoint, data, a plugin file and a good pipeline.toml, all to be spoilt."""

    folder: Path
    main: Callable[..., Ended]
    """`corefit ...` in this process, through its entry point; relative paths are those of `folder`."""

    @property
    def file(self) -> Path:
        return self.folder / "pipeline.toml"

    @property
    def text(self) -> str:
        return self.file.read_text()

    def write(self, text: str) -> None:
        self.file.write_text(text)

    def swap(self, *pairs: tuple[str, str]) -> None:
        """Replace text of pipeline.toml that must be there, the first occurrence of each."""
        text = self.text
        for old, new in pairs:
            assert old in text, old
            text = text.replace(old, new, 1)
        self.write(text)

    def lines(self, name: str, *rows: Any) -> Path:
        """Write a JSON Lines file."""
        return write_lines(self.folder / name, *rows)

    def own(self, name: str) -> Path:
        """A file or folder that is linked to the session's, replaced by a copy that may be changed."""
        path, target = self.folder / name, (self.folder / name).resolve()
        path.unlink()
        return Path(shutil.copytree(target, path) if target.is_dir() else shutil.copy(target, path))

    def command(self, *args: str, timeout: float = 120, **environment: str) -> Ended:
        """`corefit ...` as a user types it."""
        done = subprocess.run(
            [str(Path(sys.executable).with_name("corefit")), *args],
            cwd=self.folder,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def tree(self) -> Mapping[str, tuple[int, int]]:
        """Every file and folder with size and time of change."""
        paths = [path for path in sorted(self.folder.rglob("*")) if not path.is_symlink()]
        return {str(p.relative_to(self.folder)): (s.st_size, s.st_mtime_ns) for p in paths for s in [p.stat()]}


def fill(folder: Path, checkpoint: Path, pictures: Path) -> Path:
    """Put a good pipeline into the folder; its file."""
    for target in (checkpoint, *pictures.iterdir()):
        (folder / target.name).symlink_to(target)
    (folder / "bright.py").write_text(BRIGHT)
    (folder / "pipeline.toml").write_text(PIPELINE)
    return folder / "pipeline.toml"


@pytest.fixture
def project(
    tmp_path: Path,
    checkpoint: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Project:
    """A good pipeline: base/, train.jsonl, media/, heldout.jsonl, bright.py, pipeline.toml."""
    fill(tmp_path, checkpoint, pictures)
    monkeypatch.setattr("corefit.run.observers.curves", quick.blank)

    def main(*args: str) -> Ended:
        from corefit.cli import main

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["corefit", *args])
        capsys.readouterr()
        with quick.uncollected(), pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return Ended(int(ended.value.code or 0), said.out, said.err)

    return Project(tmp_path, main)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, pictures: Path) -> Path:
    """A project with a finished run, of the stages soar (all weights) and lora; not to be changed by tests."""
    import finished

    folder = tmp_path_factory.mktemp("finished")
    finished.make(fill(folder, checkpoint, pictures))
    return folder


@pytest.fixture
def finished_run(finished: Path, tmp_path: Path) -> Path:
    """The folder of that run in a copy of the project, `runs/tiny`."""
    from finished import copy

    return copy(finished, tmp_path / "project")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each reward that is a published network, a folder of a small one; tests that spoil one copy it."""
    import published

    return published.folders(tmp_path_factory.mktemp)
