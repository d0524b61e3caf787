"""`pytest --corefit PLUGIN`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from corefit.plugins import Host


def pytest_run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *args]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # rewards that are networks would wait for the hub
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The tests of everything that corefit itself offers, in a folder with a test that fails."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "test_other.py").write_text("def test_other():\n    assert False\n")
    return pytest_run(folder, "--corefit", "corefit", "-v", "-rs")


def test_every_offer_is_a_test(own):
    assert own.returncode == 0, own.stdout
    assert "test_other" not in own.stdout  # tests in folders run where they are named
    for kind, offers in Host().offers.items():
        for name, offer in offers.items():
            needs = kind == "backbones" or any(f.default is attrs.NOTHING for f in attrs.fields(offer.cls) if f.init)
            reads = kind in ("rewards", "observers")  # weights, texts in prompts, services
            ends = "(PASSED|SKIPPED)" if reads else "SKIPPED" if needs else "PASSED"
            assert re.search(rf"{kind}\.{name} {ends}", own.stdout), f"{kind}.{name}"
    for name in ("rewards.jpeg_size", "rewards.sharpness", "observers.tensorboard"):
        assert f"{name} PASSED" in own.stdout


def test_what_is_skipped_says_which_call_to_write(own):
    said = " ".join(own.stdout.split())
    assert "all keys of sources.jsonl are read, but path must be given: write a test that calls " in said
    assert "check_source(Jsonl(path=...))" in said
    assert "all keys of backbones.sd3 are read, but its check needs weights: write a test that calls " in said
    assert "backbone = Sd3(path=...); backbone.load(torch.device('cpu'), torch.float32); check_backbone(" in said


MINE = """
from attrs import field, frozen
from corefit import hookimpl
from corefit.testing import ToyBackbone


@frozen
class Mine:
    def score(self, media, prompts, meta):
        return media.mean((1, 2, 3)) - media.mean()


@frozen(eq=False, slots=False)
class Quantised(ToyBackbone):
    bits: int = 8


@frozen
class Endless:
    path: str
    limit: int = 0

    def examples(self):
        return open(self.path)


@frozen
class Contradicting(Mine):
    low: int = field(default=0)

    def __attrs_post_init__(self):
        if self.low < 1:
            raise ValueError("low is below 1")


@frozen
class Particular:
    def score(self, media, prompts, meta):
        return media.mean((1, 2, 3)) * meta[0]["weight"]


@hookimpl
def corefit_rewards():
    return {"mine": Mine, "contradicting": Contradicting, "particular": Particular}


@hookimpl
def corefit_backbones():
    return {"quantised": Quantised}


@hookimpl
def corefit_sources():
    return {"endless": Endless}
"""


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_plugin_that_cannot_be_read_is_said_without_a_traceback(tmp_path, workers):
    """Also by pytest-xdist, whose processes would keep it to themselves."""
    (tmp_path / "broken.py").write_text("def f(:\n")
    for plugin, said in (
        ("broken.py", "--corefit broken.py: plugin file broken.py:1 cannot be run (SyntaxError"),
        ("none.py", "--corefit none.py: plugins: there is no file none.py"),
        ("nobody", "--corefit nobody: it offers nothing; a file needs a function marked @corefit.hookimpl"),
    ):
        done = pytest_run(tmp_path, "-n", workers, "--corefit", plugin)
        assert done.returncode == pytest.ExitCode.USAGE_ERROR
        assert f"ERROR: {said}" in done.stderr
        assert not re.search("Traceback|INTERNALERROR", done.stdout + done.stderr)


def test_what_is_wrong_in_a_local_file_is_named(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    done = pytest_run(tmp_path, "--corefit", "mine.py", "-rs")
    assert done.returncode == 1
    assert "Mine: row 0 scores" in done.stdout
    assert "Quantised: nothing reads 'bits'" in done.stdout
    assert "Endless: nothing reads 'limit'" in done.stdout
    said = " ".join(done.stdout.split())
    assert "its defaults do not make one (low is below 1)" in said
    assert "it refuses what the check gives it (KeyError: 'weight'): write a test that calls check_reward(" in said
    assert "3 failed, 2 skipped" in said
    assert "Traceback" not in done.stdout
