"""One part in a process of its own: `python -m benchmarks.gpu.worker PART SECONDS FILE` writes its row to FILE."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import attrs

from benchmarks.gpu import parts

if __name__ == "__main__":
    name, seconds, file = sys.argv[1:]
    row = parts.measured(name, quick=False, ends=parts.deadline(float(seconds)))
    Path(file).write_text(json.dumps(attrs.asdict(row)))
