"""The check that every observer must pass, and tests of this one."""

from __future__ import annotations

from pathlib import Path

from corefit.testing import check_observer
from corefit_plugin_name import PluginName


def told(folder: Path, **keys: str) -> list[str]:
    """The lines of the diary of a run that is stopped, continued and started again, without their times."""
    check_observer(PluginName(**keys), folder)
    return [line.partition("  ")[2] for line in (folder / "diary.txt").read_text().splitlines()]


def test_it_is_an_observer():
    check_observer(PluginName())


def test_it_tells_what_happens(tmp_path: Path):
    lines = told(tmp_path)
    assert lines[:4] == [
        "rehearsal starts, or continues",
        "base: scored, toy 0.5",
        "toy: trains from step 0 to 20",
        "toy: step 10 of 20, loss 0.1",
    ]
    assert lines[4] == "rehearsal ends early: KeyboardInterrupt "
    assert lines[-1] == "rehearsal is finished"


def test_it_tells_of_a_score_once(tmp_path: Path):
    assert [line for line in told(tmp_path) if "scored" in line] == ["base: scored, toy 0.5", "toy: scored, toy 0.5"]


def test_a_metric_is_chosen(tmp_path: Path):
    assert "toy: step 10 of 20, lr 0.0001" in told(tmp_path, metric="lr")
    assert "toy: step 10 of 20" in told(tmp_path, metric="absent")
