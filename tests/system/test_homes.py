"""Two processes, each with a project folder of its own, as on two machines without a shared file system."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import forks
import pytest
from conftest import Ended, Project
from processes import ended, settings, worst


@pytest.fixture
def elsewhere(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's folder on the second machine."""
    return Path(shutil.copytree(project.folder, tmp_path_factory.mktemp("machine") / "project", symlinks=True))


def run(*folders: Path, keys: Sequence[str] = (), command: str = "run") -> Ended:
    """A process in each folder."""
    words = ("-m", "corefit", command, "pipeline.toml", *settings(*keys))
    return ended(*forks.ranks(*[words] * len(folders), cwd=folders))


def test_two_machines_train_as_two_processes_of_one_do(project, elsewhere):
    assert run(project.folder, project.folder, keys=["name='one'"]).status == 0
    shutil.rmtree(project.folder / ".corefit")
    done = run(project.folder, elsewhere, keys=["name='two'"])
    assert done.status == 0, done.err
    one, two = (project.folder / "runs" / name for name in ("one", "two"))
    for stage in ("01-soar", "02-grpo"):
        assert worst(one / stage, two / stage) == 0
    assert not (elsewhere / "runs/two/results.json").exists()
