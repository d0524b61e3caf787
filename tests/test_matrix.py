"""ci/matrix with a stand-in for uv, whose environments hold a stand-in for Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from attrs import frozen

ROOT = Path(__file__).resolve().parents[1]
UV = """\
#!/bin/sh
echo "$@" >> "$HEARD"
if [ "$1" = venv ]; then
  for last; do :; done
  mkdir -p "$last/bin"
  cp "$STANDINS/python" "$last/bin/python"
  cp "$STANDINS/corefit" "$last/bin/corefit"
  exit 0
fi
echo "Resolved 9 packages in 1.25s"
case "$*" in *$BROKEN*) echo "error: no wheels of numpy"; echo "hint: pray"; exit 1;; esac
"""
PYTHON = """\
#!/bin/sh
echo "python $@" >> "$HEARD"
echo "path ${PYTHONPATH-none}" >> "$HEARD"
echo "==== 3 passed in 0.1s ===="
exit $STATUS
"""
COREFIT = """\
#!/bin/sh
echo "corefit $@" >> "$HEARD"
mkdir -p "$(dirname "$2")/runs/digits"
echo '[{"stage": "base", "category": "all", "value": 0.5375}, {"stage": "base", "category": "two", "value": 0.1},
  {"stage": "soar", "category": "all", "value": 0.61}]' > "$(dirname "$2")/runs/digits/results.json"
"""


@frozen
class Matrix:
    folder: Path

    def run(self, *args: str, broken: str = "nothing", status: int = 0) -> tuple[int, str, str]:
        """Return the exit status, what was printed, and what the stand-ins were called with."""
        environment = {
            **os.environ,
            "PATH": f"{self.folder}:/usr/bin:/bin",
            "PYTHONPATH": "elsewhere",
            "TMPDIR": str(self.folder / "tmp"),
            "STANDINS": str(self.folder),
            "HEARD": str(self.folder / "heard"),
            "BROKEN": broken,
            "STATUS": str(status),
        }
        command = [sys.executable, str(ROOT / "ci/matrix"), *args]
        done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        heard = self.folder / "heard"
        return done.returncode, done.stdout, heard.read_text() if heard.exists() else ""


@pytest.fixture
def matrix(tmp_path: Path) -> Matrix:
    (tmp_path / "tmp").mkdir()
    for name, text in {"uv": UV, "python": PYTHON, "corefit": COREFIT}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return Matrix(tmp_path)


def test_alone_it_tries_lowest_and_newest_on_this_python(matrix: Matrix):
    status, said, heard = matrix.run()
    assert status == 0
    this = f"{sys.version_info.major}.{sys.version_info.minor}"
    rows = [[word.strip() for word in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("| ")]
    assert [(row[0], row[1], *row[3:]) for row in rows[-2:]] == [
        (this, "lowest", "1.25s", "3 passed in 0.1s"),
        (this, "newest", "1.25s", "3 passed in 0.1s"),
    ]
    installs = [line for line in heard.splitlines() if line.startswith("pip install")]
    assert "--resolution lowest-direct" in installs[0]
    assert f"--override {ROOT}/ci/newest.txt" in installs[1]
    assert all(line.endswith(f"-e {ROOT}[test]") for line in installs)
    assert not list((matrix.folder / "tmp").iterdir())  # the environments are gone


def test_the_suite_is_that_of_the_environment_whatever_is_on_the_path(matrix: Matrix):
    _, _, heard = matrix.run("--stack", "default", "--", "-n", "1", "tests/test_rng.py")
    assert "python -m pytest -n 1 tests/test_rng.py\n" in heard
    assert "path none\n" in heard


def test_a_cell_that_does_not_install_fails_and_the_others_go_on(matrix: Matrix):
    status, said, _ = matrix.run("--python", "3.13", "--python", "3.14", "--stack", "default", broken="3.14-default")
    assert status == 1
    first, second = [line for line in said.splitlines() if line.startswith("| ")][-2:]
    assert "3 passed" in first
    assert "FAILED: does not install, status 1: error: no wheels of numpy" in second


def test_a_suite_that_fails_fails(matrix: Matrix):
    status, said, _ = matrix.run("--stack", "lowest", status=3)
    assert status == 1
    assert "FAILED: the suite, status 3: 3 passed in 0.1s" in said


def test_the_example_runs_in_a_copy_that_can_be_kept(matrix: Matrix):
    kept = matrix.folder / "kept"
    status, said, heard = matrix.run(
        "--python", "3.12", "--stack", "newest", "--digits", "--keep", str(kept), "--", "--set", "seed=1"
    )
    assert status == 0
    assert "| base 53.8%, soar 61.0% |" in said
    assert f"-e {ROOT}[examples]" in heard
    assert f"corefit run {kept}/3.12-newest/digits/pipeline.toml --set seed=1" in heard
    assert (kept / "3.12-newest/digits/heldout.jsonl").is_file()


def test_without_uv_it_says_what_to_install(tmp_path: Path):
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, str(ROOT / "ci/matrix")], env=environment, text=True, capture_output=True)
    assert done.returncode
    assert "pip install uv" in done.stderr
