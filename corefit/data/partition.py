"""The partitions of a cache: folders with the rows of some examples, and a record of what is in them.

A row has the latents, captions and metadata of an example, and the numbers of its captions among those of the
partition, which stand apart (`texts`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
from attrs import field, frozen

from corefit.data import mds, texts
from corefit.data.dataset import COND, FINGERPRINTS, ROWS, TEXTS, X0, caption_bytes
from corefit.data.duplicates import fingerprint
from corefit.data.mds import TensorSpec
from corefit.system import files
from corefit.system.files import sha256

if TYPE_CHECKING:
    from corefit.data.encode import Encoder

RECORD = "part.json"
KEYS_0_1 = {"seen", "count", "failed", "enlarged", "cond"}
"""The keys of part.json as version 0.1 wrote it, without a digest."""
HASHED = (ROWS, mds.INDEX, f"{texts.FOLDER}/{mds.INDEX}")
"""The small files of a partition, whose hashes are in its record."""


@frozen
class Record:
    """The content of a partition's part.json.

    seen      how many examples the partition covers
    count     how many of them were encoded; the others' media could not be read
    failed    a message for each of those others
    enlarged  how many examples have media that are smaller than their bucket's size
    cond      dtype and shape of each tensor of a condition
    files     sha256 of the small files in the same folder, by name; empty as version 0.1 wrote it
    """

    seen: int
    count: int
    failed: Sequence[str]
    enlarged: int
    cond: Mapping[str, TensorSpec]
    files: Mapping[str, str] = field(factory=dict[str, str])

    @staticmethod
    def load(folder: Path) -> Record | None:
        """Return the record of the partition in `folder`, or None if one of its small files is missing or damaged."""
        try:
            raw = files.read_json(folder / RECORD, lambda content: set(content) == KEYS_0_1)
        except (FileNotFoundError, files.Damaged):
            return None
        cond = {name: TensorSpec(s["dtype"], tuple(s["shape"])) for name, s in raw["cond"].items()}
        record = attrs.evolve(Record(**raw), cond=cond)
        return record if _hashes(folder, record.files) == record.files else None

    def write(self, folder: Path) -> None:
        """Write the record into `folder`, with the hashes of the small files there."""
        files.write_json(folder / RECORD, attrs.asdict(attrs.evolve(self, files=_hashes(folder, HASHED))))


def _hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the sha256 of those of the files `names` that are in `folder`."""
    return {name: sha256(folder / name) for name in names if (folder / name).is_file()}


def write(folder: Path, rows: Iterator[mds.Row], encoder: Encoder) -> int:
    """Write the rows that `encoder` yields, and the captions in them; return how many rows there are.

    What is read of all rows at once also goes into a file of its own.
    """
    first, lines = next(rows, None), list[str]()
    if first is not None:
        specs = {COND + name: spec for name, spec in encoder.cond.items()}  # known once there is a row
        with mds.open_writer(folder, _columns(first)) as shards, texts.open_writer(folder, specs) as captions:
            for row in chain([first], rows):
                stored = {name: value for name, value in row.items() if name != "bucket" and name not in specs}
                shards.append({**stored, TEXTS: _numbers(row, captions)})
                prompts = [fingerprint(prompt) for prompt in row["prompts"]]
                line = {"bucket": row["bucket"], "meta": row["meta"], FINGERPRINTS: prompts}
                lines.append(json.dumps(line) + "\n")
    (folder / ROWS).write_text("".join(lines))
    return len(lines)


def _numbers(row: mds.Row, captions: texts.Writer) -> list[int]:
    """Return the number of each caption of a row, after writing those that are new."""
    of = len(row["prompts"])
    conditions = ({name: caption_bytes(row[name], n, of) for name in captions.specs} for n in range(of))
    return [captions.number(*each) for each in zip(row["prompts"], conditions, strict=True)]


def _columns(row: mds.Row) -> dict[str, str]:
    stored = {name: _encoding(name) for name in row if name != "bucket" and not name.startswith(COND)}
    return {**stored, TEXTS: "json"}


def _encoding(column: str) -> str:
    return "ndarray:float32" if column.startswith(X0) else "json"
