"""A run killed with SIGKILL at given instants, started again until it ends, and compared with one that never was."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from attrs import field, frozen

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
REDUCED: Mapping[str, object] = {
    "data.source.count": 1024,
    "data.encode_batch": 64,
    "eval.limit": 64,
    "eval.batch": 16,
    "eval.samples": 8,
    "stage.soar.steps": 40,
    "stage.soar.batch": 16,
    "stage.soar.micro_batch": 8,
    "stage.soar.checkpoint_every": 5,
    "stage.soar.log_every": 2,
    "stage.soar.sample_every": 10,
    "stage.grpo.steps": 12,
    "stage.grpo.batch": 32,
    "stage.grpo.micro_batch": 16,
    "stage.grpo.checkpoint_every": 5,
    "stage.grpo.log_every": 2,
    "stage.grpo.sample_every": 4,
}
"""What makes the digits example a matter of half a minute on one thread, with several checkpoints in each stage."""
# names in a project's folder that are read here; all else is compared as it is
RUNS, CACHE, PIPELINE, REPORT, RECORD = "runs", ".corefit/cache", "pipeline.toml", "report.html", "run.json"
BASE, STAGES, SCORES, SAMPLES = "00-base", "[0-9][0-9]-*", "scores.json", "samples/last.*"
DONE, COPY = "done.json", "done.copy.json"
METRICS, CURVES, STAMPS, MODEL, PARTIAL_MODEL = "metrics.jsonl", "metrics.png", "media.json", "model", ".partial-model"
CHECKPOINT, MANIFEST, PARTIAL = "checkpoints/step-*", "manifest.json", "checkpoints/.partial-*"
TENSORS = "checkpoints/step-*/*.safetensors"
PASSING: Mapping[str, Sequence[str]] = {
    METRICS: ("seconds", "samples_per_second"),
    MANIFEST: ("seconds", "since", "sha256", "digest"),
    DONE: ("cost", "digest"),
    COPY: ("cost", "digest"),
    RECORD: ("started", "continued", "changed", "seconds", "samples_per_second", "peak_memory", "energy_joules"),
}
"""File -> keys in which two uninterrupted runs differ. Of the clock: `seconds`, `samples_per_second`, `since`, of which
they are made, and `cost`, with peak memory; what run.json says of times. `identity` hashes, among others, the place of
the project. `sha256` is of files of which the tensors alone are compared, and `digest` is of all of a file.
"""
CACHES = 2
"""Complete folders in CACHE once all is encoded: data and prompts."""
PATIENCE = 10
"""A run that takes so many times as long as the uninterrupted one hangs."""


# a run


@frozen
class Project:
    """A pipeline in a folder of its own, and the command that runs it."""

    folder: Path
    settings: Mapping[str, object] = field(factory=dict[str, object])
    ranks: int = 1

    @staticmethod
    def digits(folder: Path, ranks: int = 1) -> Project:
        """A copy of the example with nothing encoded yet, in REDUCED settings."""
        folder.mkdir(parents=True)
        for name in (PIPELINE, "digits.py", "heldout.jsonl"):
            shutil.copy(DIGITS / name, folder)
        shutil.copytree(DIGITS / "base", folder / "base")
        return Project(folder, REDUCED, ranks)

    @property
    def run_folder(self) -> Path:
        name = tomllib.loads((self.folder / PIPELINE).read_text())["name"]
        return self.folder / RUNS / name

    @property
    def log(self) -> Path:
        """What all starts have said."""
        return self.folder / "log.txt"

    @property
    def overrides(self) -> list[str]:
        """The settings as arguments."""
        return [text for key, value in self.settings.items() for text in ("--set", f"{key}={value}")]

    def start(self) -> subprocess.Popen[bytes]:
        """The command, on one thread a rank, in a session of its own."""
        torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(self.ranks), "-m"]
        module = [*(torchrun if self.ranks > 1 else []), "corefit"]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *module, "run", PIPELINE, *self.overrides],
                cwd=self.folder,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def outcome(self) -> dict[str, str]:
        """The fingerprints of run and cache."""
        parts = {RUNS: self.run_folder, CACHE: self.folder / CACHE}
        return {f"{part}/{name}": it for part, path in parts.items() for name, it in fingerprint(path).items()}


def watched(process: subprocess.Popen[bytes]) -> Iterator[float]:
    """CPU seconds of it and all that it has started, until it ends: how far it is, whatever else the machine does.

    Never fewer than before, though processes that have ended are no longer counted.
    """
    spent = 0.0
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(process.pid)
            times = [member.cpu_times() for member in (root, *root.children(recursive=True))]
            spent = max(spent, sum(time.user + time.system for time in times))
            yield spent
        time.sleep(0.05)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for it and all that it has started, at one instant: torchrun gives each rank a session of its own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        root.suspend()
        tree = [root, *root.children(recursive=True)]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for member in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.send_signal(number)
        process.wait()
        psutil.wait_procs(tree, timeout=30)


# what must be equal


def fingerprint(folder: Path) -> dict[str, str]:
    """Relative name -> sha256 of what must be equal, of a run's folder or a cache; "folder" for a folder.

    Every other name is here, so nothing may be left over. This alone is left out:

    PASSING                      keys of JSON, with their reasons
    checkpoints/*/*.safetensors  all but the tensors: torch and safetensors order the header's metadata as it comes
    metrics.png                  all of it: it draws the two curves of the clock
    media.json                   the file: it remembers pictures by path and time stamps, if they are older than seconds
    report.html                  all but verdict, results and pictures: it shows the clock's curves, costs and times
    """
    found: dict[str, str] = {}
    for path in sorted(path for path in folder.rglob("*") if path.name != STAMPS):
        lasting = b"" if path.is_dir() else _lasting(path)
        found[path.relative_to(folder).as_posix()] = "folder" if path.is_dir() else hashlib.sha256(lasting).hexdigest()
    return found


def _lasting(path: Path) -> bytes:
    """A file's bytes without what may differ."""
    data = path.read_bytes()
    if path.name == CURVES:
        return b""
    if path.match(TENSORS):
        return repr(_tensors(data)).encode()
    if path.name in PASSING:
        values = [json.loads(line) for line in (data.splitlines() if path.name == METRICS else [data])]
        return json.dumps(_without(values, PASSING[path.name])).encode()
    if path.name == REPORT:
        return data.partition(b"<main>")[2].partition(b'<section id="curves">')[0]
    return data


def _tensors(data: bytes) -> list[tuple[str, dict[str, Any], str]]:
    """Name, dtype and shape, and sha256 of each tensor of a safetensors file, by name."""
    end = 8 + int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8:end])
    header.pop("__metadata__", None)
    places = {name: [end + offset for offset in entry.pop("data_offsets")] for name, entry in header.items()}
    return [(name, header[name], hashlib.sha256(data[slice(*places[name])]).hexdigest()) for name in sorted(header)]


def _without(value: Any, keys: Sequence[str]) -> Any:
    """JSON's types without the keys, at any depth."""
    if isinstance(value, dict):
        return {k: _without(v, keys) for k, v in value.items() if k not in keys}
    return [_without(v, keys) for v in value] if isinstance(value, list) else value


def differences(found: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """What is missing, left over or of other content, each with its name."""

    def said(name: str) -> str:
        return "left over" if name not in expected else "missing" if name not in found else "other content"

    names = sorted(found.keys() | expected.keys())
    return [f"{name}: {said(name)}" for name in names if found.get(name) != expected.get(name)]


# where a kill hits


@frozen
class Kill:
    """A kill that hit: after how many CPU seconds of its process, in which phase, and how far that was."""

    seconds: float
    phase: str
    where: str = ""

    @staticmethod
    def read(run_folder: Path, seconds: float, launched: float) -> Kill:
        """From the files that a process started at `launched` [s since 1970] has left.

        To load what a phase needs, or to take a stage up again, belongs to the phase.
        """
        if not _new(run_folder / PIPELINE, launched):
            return Kill(seconds, "start")
        folders, cache = sorted(run_folder.glob(STAGES)), run_folder.parents[1] / CACHE
        if not folders:
            return Kill(seconds, "encoding" if _encoded(cache) < CACHES else "base evaluation")
        for folder in folders:
            if folder.name != BASE and not _finished(folder):
                return _training(folder, seconds, launched)
            if len(list(folder.glob(SAMPLES))) < 2:
                return Kill(seconds, f"{folder.name[3:]} evaluation")
        if len(folders) <= len(tomllib.loads((run_folder / PIPELINE).read_text())["stage"]):
            return Kill(seconds, f"after {folders[-1].name[3:]}")
        return Kill(seconds, "end" if _new(run_folder / REPORT, launched) else "report")


def _training(folder: Path, seconds: float, launched: float) -> Kill:
    """A stage that is not finished: which part of it, the last step logged and the last checkpoint."""
    log, stage = folder / METRICS, folder.name[3:]
    steps = [json.loads(line)["step"] for line in _whole_lines(log.read_bytes())] if log.exists() else []
    kept = [int(path.name[5:]) for path in folder.glob(CHECKPOINT)]
    where = f"step {max(steps, default=0)}, checkpoint {max(kept, default='-')}"
    if any(_new(folder / name, launched) for name in (PARTIAL_MODEL, MODEL)):
        return Kill(seconds, f"{stage} model", where)
    partial = any(_new(path, launched) for path in folder.glob(PARTIAL))
    return Kill(seconds, f"{stage} {'checkpoint' if partial else 'training'}", where)


def _finished(folder: Path) -> bool:
    return (folder / DONE).exists() and json.loads((folder / DONE).read_bytes())["finished"]


def _encoded(cache: Path) -> int:
    """Complete caches."""
    return sum(path.is_dir() and not path.suffix for path in cache.glob("*"))


def _new(path: Path, launched: float) -> bool:
    return path.exists() and path.stat().st_mtime >= launched


def _whole_lines(data: bytes) -> list[bytes]:
    return data.rpartition(b"\n")[0].splitlines()


# rounds


@frozen
class Round:
    """A project that was killed and started again until it ended."""

    number: int
    folder: Path
    kills: Sequence[Kill]
    wrong: Sequence[str]
    """What differs from the uninterrupted run, or how it failed; empty if all is equal."""


@frozen
class Whole:
    """An uninterrupted run: CPU seconds until something is encoded, and in all; seconds of the clock; what it left."""

    startup: float
    work: float
    seconds: float
    outcome: Mapping[str, str]

    @staticmethod
    def of(project: Project) -> Whole:
        """Run it; RuntimeError with what it said if it fails."""
        began, process, startup, work = time.monotonic(), project.start(), 0.0, 0.0
        for work in watched(process):
            startup = startup or work * (_encoded(project.folder / CACHE) > 0)
        if process.wait():
            raise RuntimeError(f"{project.folder}: the uninterrupted run failed: {_last_line(project)}")
        return Whole(startup, work, time.monotonic() - began, project.outcome())

    def instants(self, rng: np.random.Generator) -> list[float]:
        """1 to 3, in CPU seconds of a start: the first anywhere in a whole run, others a while after the start-up."""
        later = self.startup + rng.exponential(self.work / 4, rng.integers(3))
        return [float(rng.uniform(0, self.work)), *map(float, later)]

    def round(self, number: int, project: Project, instants: Sequence[float]) -> Round:
        """Kill at each instant, then let it end, and compare. A start that ends before its instant is the last."""
        kills: list[Kill] = []
        for instant in (*instants, math.inf):
            launched, process = time.time(), project.start()
            late = launched + PATIENCE * self.seconds
            spent = next((spent for spent in watched(process) if spent >= instant or time.time() > late), None)
            if spent is None:
                wrong = [f"exit status {process.returncode}: {_last_line(project)}"] if process.wait() else []
                return Round(number, project.folder, kills, wrong or differences(project.outcome(), self.outcome))
            kill(process)
            kills.append(Kill.read(project.run_folder, spent, launched))
            if time.time() > late:
                break
        *kills, last = kills
        return Round(number, project.folder, kills, [f"hangs, in {last.phase} {last.where}"])


def _last_line(project: Project) -> str:
    return (project.log.read_text().splitlines() or ["nothing was said"])[-1]
