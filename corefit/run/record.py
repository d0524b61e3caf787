"""run.json: what a run is, how far it has come and what it took, for people and for the page.

It is written whole, at every event that matters, and names no absolute path. A run that was killed leaves the status
"running" and the time of the last change.
"""

from __future__ import annotations

import functools
import json
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from attrs import define, field

import corefit
from corefit.errors import CorefitError
from corefit.pipeline.pipeline import Pipeline
from corefit.run.agreement import VERSIONS
from corefit.run.plan import start_of
from corefit.system import files
from corefit.system.energy import EnergyMeter

RUN = "run.json"
PATH = re.compile(r"(?<![\w./~-])/(?:[^\s/'\",:;()\[\]{}]+/)+")
"""The folders of an absolute path in a text, up to its last name."""
KEPT = ("seconds", "samples_per_second", "peak_memory", "energy_joules")
"""What a stage took, which a run that finds the stage finished does not measure again."""


@define(eq=False)
class Record:
    """The content of run.json, and the energy meter of the stage that trains."""

    file: Path
    content: dict[str, Any]
    meter: EnergyMeter | None = None
    _used_before: float = field(init=False, default=0.0)
    _meter_at_start: float | None = field(init=False, default=None)

    @staticmethod
    def start(pipeline: Pipeline, devices: Sequence[str], precision: str, meter: EnergyMeter | None = None) -> Record:
        """Return the record of a run that starts, or continues.

        devices  the names of the processes' devices
        """
        file, now = pipeline.run_folder / RUN, _now()
        former = _read(file)
        took = {stage.get("name"): stage for stage in former.get("stages", [])}
        content = {
            "name": pipeline.name,
            "status": "running",
            "error": None,
            "started": former.get("started", now),
            "continued": now if former else None,
            "changed": now,
            "versions": versions(),
            "commit": _commit(pipeline.folder),
            "devices": [*devices],
            "processes": len(devices),
            "precision": precision,
            "seed": pipeline.seed,
            "base": {"name": _base_name(pipeline), "hash": None},
            "data": {},
            "stages": [
                {
                    "name": stage.name,
                    "folder": f"{number:02d}-{stage.name}",
                    "start": start_of(pipeline, stage),
                    "steps": stage.steps,
                    "step": 0,
                    "state": "waiting",
                    **{key: took[stage.name][key] for key in KEPT if key in took.get(stage.name, {})},
                }
                for number, stage in enumerate(pipeline.stage, 1)
            ],
        }
        return Record(file, content, meter)

    def stage(self, name: str) -> dict[str, Any]:
        """Return the entry of a stage, which may be changed."""
        return next(stage for stage in self.content["stages"] if stage["name"] == name)

    def training(self, name: str, step: int) -> None:
        """Note that a stage trains from `step` on; what it used for steps that it must repeat stays counted."""
        entry = self.stage(name)
        if not step:
            for key in KEPT:
                entry.pop(key, None)
        entry.update(step=step, state="training")
        self._used_before = entry.get("energy_joules", 0.0)
        self._meter_at_start = self.meter.joules() if self.meter else None

    def trained(self, name: str, step: int, cost: Mapping[str, float]) -> None:
        """Note how far a stage's training has come, and what it took so far: some of KEPT."""
        self.stage(name).update(step=step, **{key: value for key, value in cost.items() if value}, **self._energy())

    def _energy(self) -> dict[str, float]:
        now = self.meter.joules() if self.meter else None
        if now is None or self._meter_at_start is None:
            return {}
        return {"energy_joules": round(self._used_before + now - self._meter_at_start, 1)}

    def end(self, error: BaseException | None) -> None:
        """Note how the run ended."""
        stopped = isinstance(error, KeyboardInterrupt)
        self.content["status"] = "finished" if error is None else "stopped" if stopped else "failed"
        self.content["error"] = None if error is None or stopped else without_paths(_message(error))

    def write(self) -> None:
        """Write the file."""
        self.content["changed"] = _now()
        files.write_whole(self.file, (json.dumps(self.content, indent=1) + "\n").encode())


def without_paths(text: str) -> str:
    """Return a text with the last name of each absolute path in place of the path."""
    return PATH.sub("", text)


def _message(error: BaseException) -> str:
    return str(error) if isinstance(error, CorefitError) else f"{type(error).__name__}: {error}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read(file: Path) -> dict[str, Any]:
    """Return what an earlier run wrote; nothing if that cannot be read, for nothing depends on it."""
    try:
        found = json.loads(file.read_bytes())
        return found if isinstance(found, dict) and isinstance(found.get("stages"), list) else {}
    except (OSError, ValueError):
        return {}


def versions() -> dict[str, str]:
    """Return the versions of Python, corefit and the packages that results depend on."""
    found = {"corefit": corefit.__version__, "python": platform.python_version()}
    return found | {name: _version(name) for name in VERSIONS}


@functools.cache  # to find it, all of a package's metadata is parsed
def _version(package: str) -> str:
    return metadata.version(package)


def _base_name(pipeline: Pipeline) -> str:
    """Return the last name of the base model's folder, or its name on the hub."""
    path = getattr(pipeline.backbone, "path", None)
    named = str(path or type(pipeline.backbone).__name__)
    return Path(named).name if Path(named).is_absolute() else named


def _commit(folder: Path) -> str | None:
    """Return the commit of the git checkout that `folder` is in, with "-dirty" if files differ from it, or None."""
    command = ["git", "-C", str(folder), "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
