"""`corefit run` of the digits example, killed at random instants until there were enough kills.

python tests/faults --kills 40    # 20 minutes; what differs from a run that was not killed
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import tempfile
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
from harness import Project, Round, Whole, differences

SHARED = Path("/dev/shm")


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


def machine() -> dict[str, str | int | float]:
    """What the times depend on."""
    return {
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "cpus": os.cpu_count() or 0,
        "load": round(os.getloadavg()[0], 2),
    }


@frozen(kw_only=True)
class Result:
    name: str = "faults"
    date: str = field(factory=lambda: date.today().isoformat())
    machine: Mapping[str, Any] = field(factory=lambda: machine())
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


if __name__ == "__main__":
    faults(prog_name="python tests/faults")
