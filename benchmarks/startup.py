"""How long the command line lets one wait: for its help, for a check, for the first step, and for that of a resume."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
import click
from attrs import frozen
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import timing

PIPELINE = """\
name = "startup"
plugins = ["startup.py"]

[backbone]
use = "sd3"
path = "base"
max_sequence_length = 16
train = { use = "lora", rank = 2 }

[data]
source = { use = "jsonl", path = "train.jsonl" }
size = [16, 16]

[[stage]]
name = "soar"
steps = 4
batch = 4
log_every = 1
checkpoint_every = 1
objective = { use = "soar", points = 2 }

[[stage]]
name = "grpo"
steps = 1
batch = 4
objective = { use = "flow_grpo", group = 2, steps = 4 }
sampler = { use = "flow_sde", noise = 0.7 }
reward = [{ use = "bright" }]
"""
EVAL = """
[eval]
prompts = "train.jsonl"
reward = [{ use = "bright" }]
steps = 2
limit = 4
"""
PLUGIN = '''\
"""A reward, and the end of the process after the first step that is trained."""

import os
import time

from attrs import frozen

from corefit import Reward, hookimpl


@frozen
class Bright(Reward):
    def score(self, media, prompts, meta):
        return media.flatten(1).mean(1)


@hookimpl
def corefit_rewards():
    return {"bright": Bright}


@hookimpl
def corefit_step_finished(stage, state, metrics):
    if os.environ.get("UNTIL") != "checkpoint":
        with open("first", "w") as file:
            file.write(str(time.time()))
        os._exit(0)


@hookimpl
def corefit_checkpoint_saved(stage, state, path):
    os._exit(0)
'''
WORDS = ("a", "picture", "of", "red", "sky")
MADE = (".corefit", "runs")
"""What commands leave in the project."""
SETTLED = 3
"""Seconds."""


@frozen
class Wait:
    """One thing that is waited for.

    arguments  of `python -m corefit`
    target     seconds of the machine's clock
    again      whether what the command before it left is there
    resumes    whether a run like it was stopped before, after its first checkpoint
    """

    says: str
    arguments: tuple[str, ...]
    target: float | None = None
    again: bool = False
    resumes: bool = False


WAITS: Mapping[str, Wait] = {
    "help": Wait("corefit --help", ("--help",), 0.2),
    "check": Wait("the first check of a pipeline", ("check", "pipeline.toml")),
    "check again": Wait("the second one", ("check", "pipeline.toml"), 3.0, again=True),
    "step": Wait("the first step of a run", ("run", "pipeline.toml"), 12.0),
    "resume": Wait("the next step of a run that was stopped", ("run", "pipeline.toml"), 12.0, resumes=True),
    "judged step": Wait("the same where the base is judged before", ("run", "judged.toml"), 12.0),
}


@frozen
class Sample:
    """One wait: seconds of the machine's clock, and CPU seconds of the process."""

    wall: float
    cpu: float


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Each starts every command once.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the figures there as well.")
@click.option("--assert", "strict", is_flag=True, help="Exit status 1 where a target is missed.")
def startup(rounds: int, file: Path | None, strict: bool) -> None:
    """Time commands from the start of a process, on a tiny project (3 minutes)."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        _write(folder)
        samples: dict[str, list[Sample]] = {name: [] for name in WAITS}
        for number in range(rounds + 1):
            for name, wait in WAITS.items():
                sample = _waited(wait, folder)
                if number:  # the first round reads Python's files into memory
                    samples[name].append(sample)
    missed = _show(samples)
    if file:
        found = {name: [attrs.asdict(sample) for sample in each] for name, each in samples.items()}
        file.write_text(json.dumps({"benchmark": "startup", "machine": timing.machine(), "samples": found}, indent=1))
    if strict and missed:
        raise SystemExit(1)


def _waited(wait: Wait, folder: Path) -> Sample:
    """Run the command, from the start of its process to its end, or to the first step."""
    first = folder / "first"
    first.unlink(missing_ok=True)
    if not wait.again:
        for name in MADE:
            shutil.rmtree(folder / name, ignore_errors=True)
    command = [sys.executable, "-m", "corefit", *wait.arguments]
    if wait.resumes:
        subprocess.run(command, cwd=folder, env={**os.environ, "UNTIL": "checkpoint"}, check=True, capture_output=True)
    began = time.time()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None, "it is a pipe"
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    ended = float(first.read_text()) if wait.arguments[0] == "run" else time.time()
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}:\n{said.decode()}")
    return Sample(ended - began, used.ru_utime + used.ru_stime)


def _write(folder: Path) -> None:
    """Make a project: a tiny SD3, eight pictures, two pipelines."""
    import numpy as np
    from PIL import Image

    from corefit.testing import tiny_sd3

    tiny_sd3(folder / "base", words=WORDS)
    lines: list[str] = []
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(json.dumps({"media": f"{number}.png", "prompt": "a picture of a red sky"}) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "startup.py").write_text(PLUGIN)
    (folder / "pipeline.toml").write_text(PIPELINE)
    (folder / "judged.toml").write_text(PIPELINE + EVAL)
    time.sleep(SETTLED)  # a check keeps nothing of what was written just now


def _show(samples: Mapping[str, Sequence[Sample]]) -> bool:
    """Print a table; whether a target was missed."""
    table = Table(box=box.MARKDOWN)
    for heading in ("", "seconds", "quartiles", "CPU s", "target", ""):
        table.add_column(heading)
    missed = False
    for name, wait in WAITS.items():
        wall, cpu = (timing.Spread.of([getattr(s, key) for s in samples[name]]) for key in ("wall", "cpu"))
        late = wait.target is not None and wall.median > wait.target
        missed = missed or late
        verdict = "" if wait.target is None else "MISSED" if late else "ok"
        quartiles, target = f"{wall.low:.2f} .. {wall.high:.2f}", "" if wait.target is None else f"{wait.target}"
        table.add_row(wait.says, f"{wall.median:.2f}", quartiles, f"{cpu.median:.2f}", target, verdict)
    Console(width=120).print(table)
    return missed
