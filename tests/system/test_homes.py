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
    assert not [*(elsewhere / "runs/two").rglob("scores.partial")]


def test_what_a_machine_lacks_is_sent_to_it(project, elsewhere):
    """The checkpoint to go on from, and the weights of stages that are finished; nothing of it stays behind twice."""
    keys = ["name='r'", "stage.soar.checkpoint_every=1"]
    assert run(project.folder, elsewhere, keys=keys).status == 0
    here, there = (folder / "runs/r" for folder in (project.folder, elsewhere))
    before = {str(file): file.read_bytes() for file in here.rglob("model/*.safetensors")}
    shutil.rmtree(there)
    for stage in ("01-soar", "02-grpo"):  # as a kill before the end of each would leave them
        for name in ("done.json", "done.copy.json", "model", "scores.json"):
            if stage == "01-soar" or name == "scores.json":
                path = here / stage / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(here / "01-soar/checkpoints/step-000002")
    done = run(project.folder, elsewhere, keys=keys)
    assert done.status == 0, done.err
    assert "grpo: finished before, used as it is" in done.out
    assert "is damaged" not in done.out + done.err  # as a checkpoint is that a machine lacks
    assert {str(file): file.read_bytes() for file in here.rglob("model/*.safetensors")} == before != {}
    sent = {str(here / file.relative_to(there)): file.read_bytes() for file in there.rglob("model/*.safetensors")}
    assert sent == before
    assert not [*there.glob("*/checkpoints/*")]


def test_what_two_machines_cannot_do_is_refused_at_once(project, elsewhere):
    done = run(project.folder, elsewhere, keys=["shard=true"])
    assert done.status == 2
    assert done.err.count("error: with shard = true all processes write the checkpoints together, and not all") == 2
    (elsewhere / "runs/tiny").mkdir(parents=True, exist_ok=True)
    (elsewhere / "runs/tiny/pipeline.toml").touch()
    done = run(project.folder, elsewhere)
    assert done.status == 2
    assert done.err.count("error: rank 1 has this run's folder") == 2
    assert not (project.folder / ".corefit").exists()


def test_data_that_differ_between_machines_are_refused(project, elsewhere):
    (elsewhere / "train.jsonl").unlink()
    lines = (project.folder / "train.jsonl").read_text().splitlines()
    (elsewhere / "train.jsonl").write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    done = run(project.folder, elsewhere, command="prepare")
    assert done.status == 2
    assert done.err.count("error: rank 1 has examples = ") == 2


def test_a_fault_on_another_machine_is_an_error_and_no_traceback(project, elsewhere):
    """Its note is on that machine; what torch says of the lost connection would be a traceback here."""
    shutil.rmtree(elsewhere / ".corefit", ignore_errors=True)
    (elsewhere / ".corefit").write_text("in the way")
    first, second = forks.ranks(*[("-m", "corefit", "run", "pipeline.toml")] * 2, cwd=[project.folder, elsewhere])
    said, why = (each.communicate(timeout=100)[1] for each in (first, second))
    assert (first.returncode, second.returncode) == (2, 2)
    assert ".corefit/cache cannot be written" in why
    assert "rank 1 stopped: " in said or "error: another process of the run is gone" in said
    assert "Traceback" not in said + why
