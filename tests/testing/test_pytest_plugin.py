"""`pytest --corefit PLUGIN`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def pytest_run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *args]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_pytest_runs_every_check_of_a_plugin(tmp_path):
    done = pytest_run(tmp_path, "--corefit", "corefit_sft", "-v")
    assert done.returncode == 0, done.stdout
    assert "objectives.sft PASSED" in done.stdout


def test_pytest_names_what_is_wrong_in_a_local_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from attrs import frozen\nfrom corefit import hookimpl\n\n@frozen\nclass Mine:\n"
        "    def score(self, media, prompts, meta):\n        return media.mean((1, 2, 3)) - media.mean()\n\n"
        "@hookimpl\ndef corefit_rewards():\n    return {'mine': Mine}\n"
    )
    done = pytest_run(tmp_path, "--corefit", "mine.py")
    assert done.returncode == 1
    assert "Mine: row 0 scores" in done.stdout
    assert "Traceback" not in done.stdout
    assert pytest_run(tmp_path, "--corefit", "nobody").returncode == 4
