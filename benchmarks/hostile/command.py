"""`python -m benchmarks hostile`: all cases, in several slots at a time, and their table."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import click
from attrs import define, field

from benchmarks.hostile import (
    configs,
    damage,
    data,
    environment,
    models,
    offers,
    pipeline,
    play,
    process,
    ranks,
    rewards,
    seed,
    sources,
)
from benchmarks.hostile.case import Case
from benchmarks.hostile.play import Verdict
from benchmarks.hostile.seed import Slot

AREAS = {
    "pipeline": (pipeline,),
    "data": (data, sources),
    "damage": (damage,),
    "environment": (environment, process),
    "ranks": (ranks,),
    "rewards": (rewards, offers),
    "models": (models, configs),
}
PATIENCE = 600.0
"""Seconds after which a slot that says nothing is killed."""


def every_case() -> list[Case]:
    """All cases; their names are unique."""
    found = [case for modules in AREAS.values() for module in modules for case in module.cases()]
    names = [f"{case.area}/{case.name}" for case in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RuntimeError(f"cases of one name: {', '.join(twice)}")
    return found


@define(eq=False)
class Stage:
    """Where cases are played: a number of slots, each with at most one process; `path` is where verdicts go."""

    slots: Sequence[Slot]
    path: Path | None = None
    verdicts: list[Verdict] = field(factory=list[Verdict])
    _busy: dict[int, tuple[Slot, Case, float]] = field(factory=dict[int, tuple[Slot, Case, float]])

    def build(self) -> None:
        """The starts of each slot, side by side."""
        pids = [play.forked(lambda slot=slot: _built(slot), slot.folder / "build.txt") for slot in self.slots]
        for pid, slot in zip(pids, self.slots, strict=True):
            if play.waited(pid, PATIENCE) != 0:
                raise click.ClickException((slot.folder / "build.txt").read_text()[-3000:])

    def play(self, cases: Sequence[Case]) -> None:
        """All of them, as slots become free."""
        waiting = list(cases)
        try:
            while waiting or self._busy:
                busy = [slot for slot, _, _ in self._busy.values()]
                for slot in (slot for slot in self.slots if slot not in busy and waiting):
                    self._begin(slot, waiting.pop(0))
                self._collect()
                time.sleep(0.01)
        finally:
            for pid in self._busy:
                os.killpg(pid, signal.SIGKILL)

    def _begin(self, slot: Slot, case: Case) -> None:
        (slot.folder / "verdict.json").unlink(missing_ok=True)
        if case.root and not may_mount():
            self.verdicts.append(Verdict(case.name, case.area, 0, 0.0, [], "", "needs the right to mount"))
            return
        pid = play.forked(lambda: int(bool(play.judged(case, slot))), slot.folder / "harness.txt")
        self._busy[pid] = (slot, case, time.monotonic())

    def _collect(self) -> None:
        for pid, (slot, case, began) in list(self._busy.items()):
            done, _ = os.waitpid(pid, os.WNOHANG)
            if not done and time.monotonic() - began > PATIENCE:
                os.killpg(pid, signal.SIGKILL)
                done, _ = os.waitpid(pid, 0)
            if done:
                del self._busy[pid]
                self._note(slot, case)

    def _note(self, slot: Slot, case: Case) -> None:
        file = slot.folder / "verdict.json"
        fault = ["the harness's own process died"]
        found: dict[str, Any] = json.loads(file.read_bytes()) if file.exists() else {}
        verdict = Verdict(**found) if found else Verdict(case.name, case.area, -997, 0.0, fault, "")
        self.verdicts.append(verdict)
        self.keep()
        said = f"FAILED: {verdict.wrong[0]}" if verdict.wrong else "held"
        click.echo(f"{case.area}/{case.name}: {said} ({verdict.seconds:.1f} s)", err=True)

    def keep(self) -> None:
        """Write the verdicts so far, as JSON, where they are wanted."""
        if self.path:
            self.path.write_text(json.dumps([attrs.asdict(one) for one in self.verdicts], indent=1) + "\n")


def may_mount() -> bool:
    """Whether file systems can be mounted here: by root on Linux."""
    return sys.platform == "linux" and os.geteuid() == 0


def _built(slot: Slot) -> int:
    def make(folder: Path) -> None:
        if play.waited(play.forked(lambda: int(bool(seed.write(folder)))), 120) != 0:
            raise RuntimeError("the base model could not be written")

    def command(project: Any, env: Any) -> int:
        def work() -> int:
            variables = {key: value for key, value in env.items() if key != "TYPED"}
            status = play.corefit_in_this_process([env["TYPED"], "pipeline.toml"], project.folder, variables)
            (slot.folder / "modules.json").write_text(json.dumps(sorted(sys.modules)))
            return status

        status = play.waited(play.forked(work), 300)
        return -1 if status is None else status

    slot.build(command, make)
    return 0


@click.command("hostile")
@click.option("--area", "areas", multiple=True, type=click.Choice(sorted(AREAS)), help="These alone.")
@click.option("--only", multiple=True, metavar="NAME", help="Cases that have this in their name alone.")
@click.option("--seed", "number", default=0, show_default=True, help="Of the order in which cases are played.")
@click.option("--jobs", default=2, show_default=True, type=click.IntRange(1), help="Cases at the same time.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the verdicts here too.")
@click.option("--limit", type=click.IntRange(1), help="At most so many, drawn by --seed.")
@click.option("--list", "listed", is_flag=True, help="Name the cases and play none.")
def hostile(
    areas: tuple[str, ...],
    only: tuple[str, ...],
    number: int,
    jobs: int,
    path: Path | None,
    limit: int | None,
    listed: bool,
) -> None:
    """What users, disks, schedulers and plugins may do: no traceback, a message that helps, and nothing lost.

    Exit status 1 if a case fails.
    """
    cases = [case for case in every_case() if not areas or case.area in areas]
    cases = [case for case in cases if not only or any(text in f"{case.area}/{case.name}" for text in only)]
    if listed:
        click.echo("\n".join(f"{case.area}/{case.name}" for case in cases))
        return
    random.Random(number).shuffle(cases)
    cases = cases[:limit]
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="corefit-hostile-"))
    os.environ.update({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"})
    folder.chmod(0o755)  # cases without root's rights enter it too
    slots = [Slot(folder / f"slot-{number}") for number in range(min(jobs, max(1, len(cases))))]
    for slot in slots:
        slot.folder.mkdir()
    stage = Stage(slots, path)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the folder and the processes go then, too
    try:
        play.warm(["torch", "diffusers", "transformers", "peft", "accelerate", "corefit.run.run", "corefit.run.show"])
        stage.build()
        play.warm(json.loads((slots[0].folder / "modules.json").read_bytes()))
        click.echo(f"the seed is made: {time.monotonic() - began:.1f} s", err=True)
        stage.play(cases)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    stage.verdicts.sort(key=lambda one: (list(AREAS).index(one.area), one.name))
    stage.keep()
    show(stage.verdicts, time.monotonic() - began)
    if any(one.wrong for one in stage.verdicts):
        raise SystemExit(1)


def show(verdicts: Sequence[Verdict], seconds: float) -> None:
    """A row an area, then each failure with its reasons."""
    click.echo("| area | cases | held | failed | not played |\n|---|---|---|---|---|")
    for area in [*dict.fromkeys(one.area for one in verdicts), "all"]:
        mine = [one for one in verdicts if area in (one.area, "all")]
        failed, skipped = sum(bool(one.wrong) for one in mine), sum(bool(one.skipped) for one in mine)
        click.echo(f"| {area} | {len(mine)} | {len(mine) - failed - skipped} | {failed} | {skipped} |")
    click.echo(f"\n{seconds:.0f} s")
    for one in verdicts:
        if one.wrong:
            click.echo(f"\n{one.area}/{one.name} (status {one.status})")
            click.echo("\n".join(f"    {reason}" for reason in one.wrong))
