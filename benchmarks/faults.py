"""`corefit run` killed with SIGKILL at random instants, started again, and compared with a run that never was."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from threading import Lock
from typing import Any

import attrs
import click
import numpy as np
import psutil
from attrs import define, field, frozen

from benchmarks import timing

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
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
RUNS, CACHE, PIPELINE, REPORT = "runs", ".corefit/cache", "pipeline.toml", "report.html"
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
}
"""File -> keys in which two uninterrupted runs differ. Of the clock: `seconds`, `samples_per_second`, `since`, of which
they are made, and `cost`, with peak memory. `identity` hashes, among others, the place of the project. `sha256` is of
files of which the tensors alone are compared, and `digest` is of all of a file.
"""
CACHES = 2
"""Complete folders in CACHE once all is encoded: data and prompts."""
PATIENCE = 10
"""A run that takes so many times as long as the uninterrupted one hangs."""
SHARED = Path("/dev/shm")


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
    report.html                  the metrics.png that it embeds
    pipeline.toml, report.html   the place of the project, which differs from copy to copy
    """
    found: dict[str, str] = {}
    for path in sorted(path for path in folder.rglob("*") if path.name != STAMPS):
        lasting = b"" if path.is_dir() else _lasting(path, str(folder.parents[1]).encode())
        found[path.relative_to(folder).as_posix()] = "folder" if path.is_dir() else hashlib.sha256(lasting).hexdigest()
    return found


def _lasting(path: Path, place: bytes) -> bytes:
    """A file's bytes without what may differ, and without `place`."""
    data = path.read_bytes()
    if path.name == CURVES:
        return b""
    if path.match(TENSORS):
        return repr(_tensors(data)).encode()
    if path.name in PASSING:
        values = [json.loads(line) for line in (data.splitlines() if path.name == METRICS else [data])]
        return json.dumps(_without(values, PASSING[path.name])).encode()
    if path.name == REPORT:
        data = re.sub(rb'alt="[^"]*/metrics\.png" src="[^"]*"', b"", data)
    return data.replace(place, b".") if path.name in (PIPELINE, REPORT) else data


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


# a series


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


@define
class Series:
    """Rounds until there were enough kills, in `jobs` threads; a round's instants depend on seed and number alone."""

    folder: Path
    wanted: int
    seed: int
    ranks: int
    jobs: int
    rounds: list[Round] = field(factory=list[Round])
    _begun: int = 0
    _lock: Lock = field(factory=Lock)

    def play(self) -> Whole:
        """All of it. The first two runs are uninterrupted; RuntimeError if they differ."""
        with ThreadPoolExecutor(self.jobs) as pool, self._stopping():
            whole, again = pool.map(Whole.of, [self._project("whole"), self._project("again")])
            if wrong := differences(again.outcome, whole.outcome):
                raise RuntimeError(f"two uninterrupted runs in {self.folder} differ:\n" + "\n".join(wrong))
            shutil.rmtree(self.folder / "again")
            click.echo(f"uninterrupted: {whole.seconds:.1f} s, {whole.work:.1f} CPU s", err=True)
            list(pool.map(lambda _: self._rounds(whole), range(self.jobs)))
        return whole

    def _project(self, name: str) -> Project:
        return Project.digits(self.folder / name, self.ranks)

    def _rounds(self, whole: Whole) -> None:
        for number in self._numbers():
            instants = whole.instants(np.random.default_rng([self.seed, number]))
            one = whole.round(number, self._project(f"round-{number:03d}"), instants)
            with self._lock:
                self.rounds.append(one)
            if not one.wrong:
                shutil.rmtree(one.folder)
            click.echo(f"round {number}: {len(one.kills)} kills, {'DIFFERS' if one.wrong else 'equal'}", err=True)

    def _numbers(self) -> Iterator[int]:
        """Of rounds that nobody has begun, while kills are wanted."""
        while True:
            with self._lock:
                if sum(len(one.kills) for one in self.rounds) >= self.wanted:
                    return
                self._begun += 1
                number = self._begun
            yield number

    @contextlib.contextmanager
    def _stopping(self) -> Generator[None]:
        """What was started ends with the series, however that ends."""
        try:
            yield
        except BaseException:
            self.wanted = 0
            for child in psutil.Process().children():
                child.kill()
            raise


def _shared() -> set[str]:
    return {path.name for path in SHARED.iterdir()} if SHARED.is_dir() else set()


def _abandoned(names: set[str]) -> list[str]:
    """Those of the names in shared memory that no process has mapped."""
    held: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            held |= set(re.findall(rf"{SHARED}/(\S+)", maps.read_text()))
    return sorted(names - held)


@frozen(kw_only=True)
class Result:
    benchmark: str = "faults"
    date: str = field(factory=lambda: date.today().isoformat())
    machine: Mapping[str, Any]
    seed: int
    ranks: int
    seconds: float
    """Of the uninterrupted run, by the clock."""
    work: float
    """Of the same, CPU seconds."""
    rounds: Sequence[Round]
    shared: Sequence[str]
    """What is left in shared memory."""

    @property
    def phases(self) -> Counter[str]:
        return Counter(kill.phase for one in self.rounds for kill in one.kills)

    @property
    def equal(self) -> int:
        return sum(not one.wrong for one in self.rounds)

    @property
    def passed(self) -> bool:
        return self.equal == len(self.rounds) and not self.shared


@click.command("faults")
@click.option("--kills", default=40, show_default=True, type=click.IntRange(1), help="At least so many.")
@click.option("--seed", default=0, show_default=True, help="Of the instants.")
@click.option("--ranks", default=1, show_default=True, type=click.IntRange(1), help="Processes of a run, by torchrun.")
@click.option("--jobs", default=2, show_default=True, type=click.IntRange(1, 2), help="Processes at the same time.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here too.")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), help="New folder for the runs.")
def faults(kills: int, seed: int, ranks: int, jobs: int, path: Path | None, folder: Path | None) -> None:
    """Kill runs with SIGKILL at random instants; each must end in the bytes of one that was not killed.

    Exit status 1 if one does not; its folder, and that of the uninterrupted run, are then kept.
    """
    folder = folder or Path(tempfile.mkdtemp(prefix="corefit-faults-"))
    before, series = _shared(), Series(folder.absolute(), kills, seed, ranks, max(1, jobs // ranks))
    whole = series.play()
    result = Result(
        machine=timing.machine(),
        seed=seed,
        ranks=ranks,
        seconds=whole.seconds,
        work=whole.work,
        rounds=sorted(series.rounds, key=lambda one: one.number),
        shared=_abandoned(_shared() - before),
    )
    if path:
        path.write_text(json.dumps(attrs.asdict(result) | {"passed": result.passed}, indent=2, default=str) + "\n")
    show(result)
    if not result.passed:
        raise SystemExit(1)
    shutil.rmtree(folder)


def show(result: Result) -> None:
    """A line a round, then the sums."""
    from rich.console import Console
    from rich.table import Table

    console, table = Console(), Table("round", "killed after", "in", "at", "")
    for one in result.rounds:
        verdict = "\n".join([f"DIFFERS, kept in {one.folder}", *one.wrong]) if one.wrong else "equal"
        cells = [[f"{kill.seconds:.1f} CPU s", kill.phase, kill.where] for kill in one.kills] or [["", "none hit", ""]]
        table.add_row(str(one.number), *("\n".join(column) for column in zip(*cells, strict=True)), verdict)
    console.width = max(console.width, 110)
    console.print(table)
    console.print(", ".join(f"{phase} {number}" for phase, number in result.phases.most_common()))
    for name in result.shared:
        console.print(f"{SHARED / name}: left over")
    rounds = len(result.rounds)
    console.print(f"{result.phases.total()} kills in {rounds} rounds: {result.equal} of {rounds} equal")
