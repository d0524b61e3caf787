"""examples/plugin as a stranger's: built to a wheel, installed from it, run after SFT, gone again when uninstalled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import forks
import pytest
from conftest import Project
from processes import ended

SOURCE = Path(__file__).parents[2] / "examples" / "plugin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed into."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run(
        [*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", folder, SOURCE],
        check=True,
        capture_output=True,
        timeout=300,
    )
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True, capture_output=True)
    return folder / "site"


def environment(installed: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(installed), *filter(None, [os.environ.get("PYTHONPATH")])])}


def test_it_runs_after_sft_from_its_wheel(installed: Path, project: Project) -> None:
    text = project.text
    first = text.index("[[stage]]")
    project.write(
        text[:first]
        + """[[stage]]
name = "sft"
steps = 2
batch = 4
objective = { use = "sft" }

[[stage]]
name = "reflexflow"
steps = 2
batch = 4
log_every = 1
objective = { use = "reflexflow", reach = 0.3 }

"""
        + text[text.index("[eval]") :]
    )
    done = ended(forks.start("-m", "corefit", "run", "pipeline.toml", cwd=project.folder, **environment(installed)))
    assert done.status == 0, done.err
    lines = (project.folder / "runs/tiny/02-reflexflow/metrics.jsonl").read_text().splitlines()
    assert {"loss", "drift", "adr"} <= json.loads(lines[-1]).keys()

    gone = project.main("check", "pipeline.toml")
    assert gone.status == 2
    assert "'reflexflow'" in gone.err


def test_corefit_names_its_owner(installed: Path, project: Project) -> None:
    listed = project.command("plugins", **environment(installed))
    assert "reflexflow  (corefit-reflexflow" in listed.out
    assert "reflexflow" not in project.main("plugins").out


def test_its_own_tests_pass(installed: Path) -> None:
    command = ["pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--rootdir", str(SOURCE), str(SOURCE / "tests")]
    done = ended(forks.start("-m", *command, cwd=installed, **environment(installed)))
    assert done.status == 0, done.out


def test_it_is_small() -> None:
    assert len((SOURCE / "corefit_reflexflow.py").read_text().splitlines()) < 120
