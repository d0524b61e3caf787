"""Held-out prompts that training sees are counted, whatever their case and white space."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from test_dataset import Toy

from corefit.data.cache import prepare
from corefit.data.dataset import ROWS, Dataset
from corefit.data.duplicates import duplicates
from corefit.data.settings import Data
from corefit.data.sources import Listed
from corefit.system import files
from corefit.types import Example


class Words(Toy):
    """Any prompt will do."""

    def encode_text(self, prompts: Sequence[str]) -> Any:
        return super().encode_text(["1"] * len(prompts))


@attrs.frozen
class Captioned:
    """Pictures with one or several captions each."""

    captions: tuple[tuple[str, ...], ...]

    def examples(self) -> Iterator[Example]:
        for n, captions in enumerate(self.captions):
            yield Example(captions, np.full((4, 4, 3), n, np.uint8), {"n": n})


def encoded(folder: Path, source: Any, media: bool, keep: str | None = None) -> Dataset:
    data = Data(source, size=(4, 4), keep=keep)
    backbone: Any = Words()
    return Dataset.open(prepare(data, backbone, folder, media=media), keep=data.filter)


TRAINED = Captioned((("a red sky", "Dusk"), ("a  Blue\tsea",), ("an owl",)))
HELD_OUT = Listed(("A RED SKY ", "a blue sea", "dusk", "a red sky.", "a red sky", "owl"))


def test_duplicates_are_counted(tmp_path):
    trained, held_out = encoded(tmp_path, TRAINED, True), encoded(tmp_path, HELD_OUT, False)
    assert duplicates(trained, held_out, len(held_out)) == 4
    assert duplicates(trained, held_out, 2) == 2, "those that are used"
    filtered = encoded(tmp_path, TRAINED, True, keep="n >= 1")
    assert duplicates(filtered, held_out, len(held_out)) == 1, "those that training keeps"


def test_a_cache_of_version_0_1_does_not_tell(tmp_path):
    trained, held_out = encoded(tmp_path, TRAINED, True), encoded(tmp_path, HELD_OUT, False)
    folder = trained.shards.folder
    file = folder / "part-00000" / ROWS
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({key: line[key] for key in ("bucket", "meta")}) + "\n" for line in lines))
    hashes = {**trained.manifest.files, f"part-00000/{ROWS}": files.sha256(file)}
    attrs.evolve(trained.manifest, files=hashes).write(folder)
    assert duplicates(Dataset.open(folder), held_out, 3) is None
