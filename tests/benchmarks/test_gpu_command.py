"""`python -m benchmarks gpu --quick` on a CPU: every kind of part runs, and one that fails is a row of the table."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner

from benchmarks.__main__ import main
from benchmarks.gpu import command, measuring, models, parts, rows
from benchmarks.gpu.rows import Row


def ran(folder: Path, *names: str, **options: str) -> dict[str, dict]:
    """The rows of a quick run of some parts, by part."""
    named = [word for name in names for word in ("--only", name)]
    others = [word for key, value in options.items() for word in (f"--{key}", value)]
    done = CliRunner().invoke(main, ["gpu", "--quick", "--out", str(folder), *named, *others])
    assert done.exit_code == 0, done.output
    return {row["part"]: row for row in json.loads((folder / "results.json").read_text())["rows"]}


def test_it_runs_on_a_cpu_and_writes_both_files(tmp_path):
    names = ("product", "sft", "soar, published", "flux, grpo")
    found = ran(tmp_path, *names)
    assert {name: row["status"] for name, row in found.items()} == dict.fromkeys(names, "ok")
    assert found["product"]["used"] == 1
    for name in names[1:]:
        assert found[name]["rate"] == pytest.approx(parts.PARTS[name].rows / found[name]["seconds"])
        assert 0 < found[name]["used"] < 1
        assert found[name]["peak"] > 0
    table = (tmp_path / "results.md").read_text()
    assert all(f"| {name} | ok |" in table for name in names)


def test_a_part_that_fails_is_a_row_and_not_the_end(tmp_path, monkeypatch):
    real = parts.measured

    def measured(name, **keys):
        if name == "sft":
            raise torch.cuda.OutOfMemoryError("no memory | at all")
        return real(name, **keys)

    monkeypatch.setattr(parts, "measured", measured)
    found = ran(tmp_path, "sft", "product")
    assert found["sft"]["status"] == "FAIL"
    assert "no memory" in found["sft"]["note"]
    assert found["product"]["status"] == "ok"
    assert "no memory / at all" in (tmp_path / "results.md").read_text(), "a bar would end the cell"


def test_what_is_left_when_time_is_out_is_skipped(tmp_path):
    assert ran(tmp_path, "product", minutes="0")["product"]["status"] == "skipped"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_quick_runs(tmp_path):
    done = CliRunner().invoke(main, ["gpu", "--out", str(tmp_path / "none")])
    assert done.exit_code == 2
    assert "--quick" in done.output
    assert not (tmp_path / "none").exists()


def test_all_parts_together_take_25_minutes_at_most():
    assert sum(parts.most_seconds(name) for name in parts.names()) <= 25 * 60
    assert {part.against for part in parts.PARTS.values()} - {""} <= set(parts.PARTS)


def test_a_process_that_dies_leaves_its_last_words(monkeypatch):
    monkeypatch.setattr(
        command, "_run", lambda *_: subprocess.CompletedProcess([], -9, "", "a warning\nCUDA error: out of luck\n")
    )
    row = command._alone("sft", 1.0)
    assert (row.status, row.note) == ("FAIL", "exit status -9: CUDA error: out of luck")


def test_a_process_that_takes_too_long_is_a_row(monkeypatch):
    def run(arguments, seconds):
        raise subprocess.TimeoutExpired("python", seconds)

    monkeypatch.setattr(command, "_run", run)
    (row,) = command._rows("sft", quick=False, ends=time.monotonic() + 30)
    assert row.status == "FAIL"
    assert "did not end" in row.note


def test_each_test_is_a_row():
    case = ElementTree.fromstring(
        '<testcase name="test_a_thing" time="1.5"><failure message="assert 1 == 2"/></testcase>'
    )
    assert command._verdict(case) == Row(part="tests", name="test: a thing", status="FAIL", note="assert 1 == 2")
    case = ElementTree.fromstring('<testcase name="test_a_thing" time="1.5"><skipped message="no GPU"/></testcase>')
    assert command._verdict(case).status == "skipped"
    assert command._verdict(ElementTree.fromstring('<testcase name="test_b" time="1.5"/>')).status == "ok"


def test_rows_are_compared_with_what_they_are_against():
    product = Row(part="product", name="product", status="ok", flops=1e12)
    ours = Row(part="soar", name="soar", status="ok", seconds=3.0, flops=5e11, against="theirs")
    theirs = Row(part="theirs", name="theirs", status="ok", seconds=4.0)
    found = rows.compared([product, ours, theirs])
    assert (found[1].ratio, found[1].used) == (0.75, 0.5)
    assert found[2].ratio is None
    failed = Row(part="theirs", name="theirs", status="FAIL")
    assert rows.compared([product, ours, failed])[1].ratio is None


def test_real_dimensions_need_the_operations_that_they_should():
    """Counted by hand: 2 for each weight that a token meets, and attention's products; a backward takes twice that."""
    subject = models.sd3(Path(), torch.device("cpu"), 1, quick=False)
    assert subject.shape == (16, 64, 64)
    each = measuring.Operations.of(subject)
    width, image, text = 1536, 1024, 333
    linear = 24 * 12 * width**2 * 2 * (image + text) + 13 * 4 * width**2 * 2 * image
    attention = 4 * width * (24 * (image + text) ** 2 + 13 * image**2)
    assert each.forward == pytest.approx(linear + attention, rel=0.03)
    assert each.both == pytest.approx(3 * each.forward, rel=0.03)
