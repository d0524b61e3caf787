"""The command: parts one after the other, each within its time, and after each of them the table written anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click

from benchmarks.gpu import parts, rows
from benchmarks.gpu.rows import Row

ROOT = Path(__file__).parents[2]
LEAST = 15.0
"""Seconds that must be left for a part to be begun."""
LONGEST_NOTE = 300


@click.command()
@click.option("--quick", is_flag=True, help="Tiny models, also on a CPU: shows that it runs; its figures mean nothing.")
@click.option(
    "--out",
    "folder",
    default=Path("gpu-results"),
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="results.json and results.md go there.",
)
@click.option("--minutes", default=25.0, show_default=True, type=click.FloatRange(0), help="For everything together.")
@click.option("--only", multiple=True, type=click.Choice([*parts.names()]), help="Only these parts.")
@click.option("--assert", "strict", is_flag=True, help="Exit with 1 if a part fails.")
def gpu(quick: bool, folder: Path, minutes: float, only: Sequence[str], strict: bool) -> None:
    """Everything that needs a GPU, on one card: tests marked `gpu`, then steps of SD3.5-medium and FLUX.1-dev.

    It needs no network and no file of weights. A part that fails is a row of the table.
    """
    ends, about = time.monotonic() + 60 * minutes, _about(quick)
    if not quick and "gpu" not in about["machine"]:
        raise click.UsageError("torch finds no GPU; with --quick everything runs in tiny sizes on a CPU")
    folder.mkdir(parents=True, exist_ok=True)
    found = list[Row]()
    for name in [*(only or parts.names())]:
        for row in _rows(name, quick, ends):
            found.append(row)
            click.echo(f"{row.name}: {row.status} {row.note if row.status != 'ok' else _brief(row)}")
        rows.write(folder, found, about)
    click.echo(f"\n{(folder / 'results.md').read_text()}")
    if strict and any(row.status == "FAIL" for row in found):
        raise SystemExit(1)


def _brief(row: Row) -> str:
    return "" if row.seconds is None else f"{row.seconds:.3g} s a step"


def _about(quick: bool) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    import torch

    from benchmarks import timing

    machine = timing.machine()
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        machine |= {"gpu": card.name, "gpu memory": f"{card.total_memory / rows.GIB:.0f} GiB"}
        machine |= {"cuda": str(torch.version.cuda)}
    return {"date": date.today().isoformat(), "quick": quick, "machine": machine}


def _rows(name: str, quick: bool, ends: float) -> Iterator[Row]:
    """Run a part within the time that is left; whatever happens to it is a row."""
    seconds = min(parts.most_seconds(name), ends - time.monotonic())
    if seconds < LEAST:
        yield Row(part=name, name=name, status="skipped", note="no time was left")
        return
    try:
        yield from _tests(seconds) if name == "tests" else [_here(name) if quick else _alone(name, seconds)]
    except subprocess.TimeoutExpired:
        yield Row(part=name, name=name, status="FAIL", note=f"it did not end within {seconds:.0f} s")
    except Exception as error:  # one part's failure is not the end of the others
        yield Row(part=name, name=name, status="FAIL", note=f"{type(error).__name__}: {error}"[:LONGEST_NOTE])


def _here(name: str) -> Row:
    """Measure a part in this process."""
    return parts.measured(name, quick=True, ends=time.monotonic())


def _alone(name: str, seconds: float) -> Row:
    """Measure a part in a process of its own, whose memory is nobody else's and whose end is only its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "row.json")
        done = _run(["-m", "benchmarks.gpu.worker", name, str(seconds), str(file)], seconds)
        if not file.exists():
            return Row(part=name, name=name, status="FAIL", note=_last_words(done))
        return Row(**json.loads(file.read_text()))


def _tests(seconds: float) -> Iterator[Row]:
    """A row for each test that is marked `gpu`."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        options = ["-q", "-n", "0", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        done = _run(["-m", "pytest", *options, "tests/gpu"], seconds)
        cases = [*ElementTree.parse(report).iter("testcase")] if report.exists() else []
    if not cases:
        yield Row(part="tests", name="tests", status="FAIL", note=_last_words(done))
    for case in cases:
        yield _verdict(case)


def _verdict(case: ElementTree.Element) -> Row:
    name = f"test: {case.get('name', '').removeprefix('test_').replace('_', ' ')}"
    for tag in ("failure", "error", "skipped"):
        if (found := case.find(tag)) is not None:
            note = (found.get("message") or "").strip()[:LONGEST_NOTE]
            return Row(part="tests", name=name, status="skipped" if tag == "skipped" else "FAIL", note=note)
    return Row(part="tests", name=name, status="ok", note=f"{float(case.get('time', 0)):.1f} s")


def _run(arguments: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run Python from the repository's root, without the network."""
    offline: Mapping[str, str] = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    """The last line that a process printed to stderr, or else to stdout; that of an exception says what it was."""
    lines = [line.strip() for said in (done.stdout, done.stderr) for line in said.splitlines() if line.strip()]
    return f"exit status {done.returncode}: {lines[-1] if lines else 'it said nothing'}"[:LONGEST_NOTE]
