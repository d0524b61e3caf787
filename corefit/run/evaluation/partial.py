"""Scores of an evaluation in progress, kept on the disk, so that one that was killed goes on where it was."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from attrs import frozen

from corefit.system import files

PARTIAL = "scores.partial"
"""The folder of these files in that of a stage."""
RowScores = Mapping[str, Any]
"""What is known of a prompt whose medium is scored: {"values": metric -> score, "category": ..., "prompt": ...}."""


@frozen
class PartialScores:
    """The scores of the prompts that are done, in a folder with a small file for each batch of prompts.

    A prompt's scores depend on its row alone. So it does not matter which process scored it, in which batch, or with
    how many processes the evaluation goes on.

    identity  hash of what determines the scores; files of another identity are ignored
    """

    folder: Path
    identity: str

    def read(self) -> dict[int, RowScores]:
        """Return the scores of all prompts that are done, by the number of their row."""
        found: dict[int, RowScores] = {}
        for file in sorted(self.folder.glob("rows-*.json")):
            with suppress(files.Damaged):
                content = files.read_json(file)
                if content["identity"] == self.identity:
                    found |= dict(zip(content["rows"], content["scores"], strict=True))
        return found

    def add(self, scores: Mapping[int, RowScores]) -> None:
        """Write the scores of a batch of rows; they are on the disk when this returns."""
        content = {"identity": self.identity, "rows": [*scores], "scores": [*scores.values()]}
        files.write_json(self.folder / f"rows-{min(scores):07d}.json", content)

    def remove(self) -> None:
        """Remove the files, once the scores of all prompts are where they belong."""
        shutil.rmtree(self.folder, ignore_errors=True)
