"""The rows of the table, and the two files that they are written to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
from attrs import frozen

GIB = 1 << 30
Status = Literal["ok", "FAIL", "skipped"]


@frozen(kw_only=True)
class Row:
    """What one part found.

    part        name of the part, and `name` what was measured in it
    seconds     of one step, the median
    low, high   quartiles of the same
    rate        samples a second
    flops       floating-point operations a second that the step needs, recomputing left out
    used        the share of a matrix product's rate that this is
    peak        bytes of the device's memory at most
    ratio       seconds over those of the row `against`
    note        why it failed or was skipped, or what to know
    """

    part: str
    name: str
    status: Status
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    rate: float | None = None
    flops: float | None = None
    used: float | None = None
    peak: int | None = None
    against: str = ""
    ratio: float | None = None
    note: str = ""


def compared(rows: Sequence[Row]) -> list[Row]:
    """Fill in what takes two rows: the utilization, and the ratio to the row that each is compared with."""
    product = next((row.flops for row in rows if row.part == "product" and row.flops), None)
    seconds = {row.name: row.seconds for row in rows if row.seconds}
    return [
        attrs.evolve(row, used=_over(row.flops, product), ratio=_over(row.seconds, seconds.get(row.against)))
        for row in rows
    ]


def _over(value: float | None, of: float | None) -> float | None:
    return value / of if value and of else None


def write(folder: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """Write results.json and results.md, each whole or not at all."""
    from corefit.system import files

    found = compared(rows)
    content = {"benchmark": "gpu", **about, "rows": [attrs.asdict(row) for row in found]}
    files.write_whole(folder / "results.json", (json.dumps(content, indent=1) + "\n").encode())
    files.write_whole(folder / "results.md", markdown(found, about).encode())


def markdown(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    """The table, under a line that says what it was measured on."""
    machine = ", ".join(f"{key} {value}" for key, value in about.items() if not isinstance(value, Mapping))
    hardware = ", ".join(f"{key} {value}" for key, value in about.get("machine", {}).items())
    heads = ("what", "", "s a step", "samples/s", "TFLOP/s", "of the product", "peak GiB", "against", "")
    lines = [f"{machine}; {hardware}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(_cells(row))} |" for row in rows)]) + "\n"


def _cells(row: Row) -> Iterator[str]:
    yield row.name
    yield row.status
    spread = f" ({row.low:.3g} .. {row.high:.3g})" if row.low is not None and row.high is not None else ""
    yield "" if row.seconds is None else f"{row.seconds:.3g}{spread}"
    yield "" if row.rate is None else f"{row.rate:.3g}"
    yield "" if row.flops is None else f"{row.flops / 1e12:.3g}"
    yield "" if row.used is None else f"{row.used:.1%}"
    yield "" if row.peak is None else f"{row.peak / GIB:.2f}"
    yield "" if row.ratio is None else f"{row.ratio:.2f} of {row.against}"
    yield row.note.replace("|", "/").replace("\n", " ")
