"""`pytest --corefit PLUGIN`."""

from __future__ import annotations

import re
from pathlib import Path

import attrs
import forks
import pytest
from conftest import Ended
from processes import ended

from corefit.plugins import Host

LEARNED = "objectives and not sft and not sum and not soar"
"""Objectives whose check takes seconds each; test_first_party.py makes it for all of them."""


def pytest_run(folder: Path, *args: str) -> Ended:
    """`pytest ...`; rewards that are networks would wait for the hub."""
    return ended(forks.start("-m", "pytest", "-p", "no:cacheprovider", *args, cwd=folder, HF_HUB_OFFLINE="1"))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a test that fails."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "test_other.py").write_text("def test_other():\n    assert False\n")
    return folder


@pytest.fixture(scope="module")
def checked(own: Path) -> Ended:
    """The tests of what corefit itself offers, but for LEARNED."""
    return pytest_run(own, "--corefit", "corefit", "-v", "-rs", "-k", f"not ({LEARNED})")


def test_every_offer_is_a_test(own):
    listed = pytest_run(own, "--corefit", "corefit", "--collect-only", "-q")
    assert listed.status == 0, listed.out
    found = {line.rpartition("::")[2] for line in listed.out.splitlines() if "::" in line}
    # tests in folders, such as test_other, run where they are named
    assert found == {f"{kind}.{name}" for kind, offers in Host().offers.items() for name in offers}


def test_every_offer_is_checked_with_its_defaults_or_skipped(checked):
    assert checked.status == 0, checked.out
    for kind, offers in Host().offers.items():
        for name, offer in offers.items():
            if kind == "objectives" and name not in ("sft", "sum", "soar"):
                continue
            needs = kind == "backbones" or any(f.default is attrs.NOTHING for f in attrs.fields(offer.cls) if f.init)
            reads = kind in ("rewards", "observers")  # weights, texts in prompts, services
            ends = "(PASSED|SKIPPED)" if reads else "SKIPPED" if needs else "PASSED"
            assert re.search(rf"{kind}\.{name} {ends}", checked.out), f"{kind}.{name}"
    for name in ("rewards.jpeg_size", "rewards.sharpness", "observers.tensorboard"):
        assert f"{name} PASSED" in checked.out


def test_what_is_skipped_says_which_call_to_write(checked):
    said = " ".join(checked.out.split())
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


@pytest.mark.parametrize(
    ("workers", "plugin", "said"),
    [
        ("0", "broken.py", "plugin file broken.py:1 cannot be run (SyntaxError"),
        ("0", "none.py", "plugins: there is no file none.py"),
        ("0", "nobody", "it offers nothing; a file needs a function marked @corefit.hookimpl"),
        ("1", "broken.py", "plugin file broken.py:1 cannot be run (SyntaxError"),
    ],
)
def test_a_plugin_that_cannot_be_read_is_said_without_a_traceback(tmp_path, workers, plugin, said):
    """Also by pytest-xdist, whose processes would keep it to themselves."""
    (tmp_path / "broken.py").write_text("def f(:\n")
    done = pytest_run(tmp_path, "-n", workers, "--corefit", plugin)
    assert done.status == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: --corefit {plugin}: {said}" in done.err
    assert not re.search("Traceback|INTERNALERROR", done.out + done.err)


def test_what_is_wrong_in_a_local_file_is_named(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    done = pytest_run(tmp_path, "--corefit", "mine.py", "-rs")
    assert done.status == 1
    assert "Mine: row 0 scores" in done.out
    assert "Quantised: nothing reads 'bits'" in done.out
    assert "Endless: nothing reads 'limit'" in done.out
    said = " ".join(done.out.split())
    assert "its defaults do not make one (low is below 1)" in said
    assert "it refuses what the check gives it (KeyError: 'weight'): write a test that calls check_reward(" in said
    assert "3 failed, 2 skipped" in said
    assert "Traceback" not in done.out
