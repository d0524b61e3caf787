"""The samples that rewards score best and worst, which are kept for the page beside those of the first prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from corefit.system import files

if TYPE_CHECKING:
    from torch import Tensor

EXTREMES = "extremes.safetensors"
EACH = 4
"""How many of the best, and of the worst samples of each reward are kept."""


def choose(values: Mapping[str, Sequence[float]], shown: int) -> list[int]:
    """Return the rows of the best and the worst scores, metric -> [n]; of equal ones the first, none below `shown`."""
    rows: set[int] = set()
    for scores in values.values():
        rows.update(sorted(range(len(scores)), key=lambda row: (scores[row], row))[:EACH])
        rows.update(sorted(range(len(scores)), key=lambda row: (-scores[row], row))[:EACH])
    return sorted(row for row in rows if row >= shown)


def write(folder: Path, rows: Sequence[int], media: Tensor | None) -> None:
    """Write the media [n, 3, H, W] in [0, 1] of `rows`, or remove what an earlier evaluation left if there are none."""
    from safetensors.torch import save

    file = folder / EXTREMES
    if media is None:
        file.unlink(missing_ok=True)
        return
    pixels = (media * 255).round().byte().contiguous()
    files.write_whole(file, save({"media": pixels}, metadata={"rows": json.dumps([*rows])}))
