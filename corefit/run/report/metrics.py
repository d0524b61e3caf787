"""metrics.jsonl: one JSON object per logged step, {"step": 20, "loss": 0.31, ...}; NaN and infinity are null."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from attrs import frozen

from corefit.errors import DataError
from corefit.system.files import write_whole


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read all complete lines, in order; an incomplete last line, left by a killed run, is ignored.

    Raises DataError for a line that is not an object with a whole-numbered "step".
    """
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [_parse(path, number, line) for number, line in enumerate(whole.splitlines(), 1)]


@frozen
class MetricsLog:
    """Appends to the metrics.jsonl at `path`. The file is opened for each line, so nothing must be closed."""

    path: Path

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line; it is on the disk when this returns. `metrics` may not name "step"."""
        assert "step" not in metrics, "the step is an argument of its own"
        line = {"step": step, **{name: _number(value) for name, value in metrics.items()}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def truncate_after(self, step: int) -> None:
        """Drop lines of later steps, which a resume from `step` repeats, and an incomplete last line."""
        if self.path.exists():
            kept = [line for line in read_metrics(self.path) if line["step"] <= step]
            write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def _number(value: float) -> float | None:
    """Return a number that JSON has, or None; anything with __float__ (a numpy or torch scalar) is a number."""
    plain = value if isinstance(value, int) else float(value)
    return plain if math.isfinite(plain) else None


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number}: not JSON ({error}); correct the line") from error
    found = cast(dict[str, Any], values) if isinstance(values, dict) else {}
    if not isinstance(found.get("step"), int):
        raise DataError(f'{path}, line {number}: expected {{"step": <whole number>, ...}}; correct the line')
    return found
