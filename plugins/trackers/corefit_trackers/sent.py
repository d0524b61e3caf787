"""What a tracker has been sent, noted in the run's folder, so that a run that continues sends nothing twice."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from attrs import define, field

from corefit.types import Scored


@define
class Sent:
    """What a tracker was sent of one stage, or of the base. The note lies in the stage's folder, and goes with it.

    run     the identifier of the tracker's run that it was sent to
    step    the last step whose metrics were sent
    scores  the digest of the scores that were sent
    """

    file: Path
    run: str
    step: int = 0
    scores: str = ""

    @staticmethod
    def read(file: Path, run: str) -> Sent:
        """Return what was sent to `run`: nothing if the file says nothing of it."""
        found = _read(file)
        if found.get("run") != run:
            return Sent(file, run)
        return Sent(file, run, int(found.get("step", 0)), str(found.get("scores", "")))

    def write(self) -> None:
        """Write the note."""
        _write(self.file, {"run": self.run, "step": self.step, "scores": self.scores})


@define
class SentRun:
    """Which run of a tracker a run's folder belongs to, and the folders of the stages that it was sent metrics of."""

    file: Path
    id: str
    stages: list[str] = field(factory=list[str])

    @staticmethod
    def read(file: Path) -> SentRun:
        """Return the run that the file names, or a new one."""
        found = _read(file)
        return SentRun(file, str(found["id"]), [*found["stages"]]) if {"id", "stages"} <= found.keys() else _new(file)

    def entered(self, stage: Path, note: Path) -> SentRun:
        """Return the run for the metrics of a stage that is about to train: a new one if it was trained before.

        The note of what was sent lies in the stage's folder. If it is gone the stage is another one: its folder was
        moved away, and what was sent of it is not what is to come.
        """
        run = _new(self.file) if stage.name in self.stages and not note.exists() else self
        if stage.name not in run.stages:
            run.stages.append(stage.name)
        _write(run.file, {"id": run.id, "stages": run.stages})
        return run


def digest(scored: Scored) -> str:
    """Return a digest of scores, by which they are known again."""
    return hashlib.sha256(json.dumps(dict(scored.values), sort_keys=True).encode()).hexdigest()[:16]


def _new(file: Path) -> SentRun:
    return SentRun(file, secrets.token_hex(6))


def _read(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file; nothing where there is none, or a damaged one."""
    try:
        found: Any = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return dict(found) if isinstance(found, dict) else {}


def _write(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole: a process that is killed leaves the old one or the new one."""
    part = file.with_name(f".{file.name}.part")
    part.write_text(json.dumps(content), encoding="utf-8")
    os.replace(part, file)
