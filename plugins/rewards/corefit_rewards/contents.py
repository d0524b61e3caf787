"""Hashes of the files that a reward's scores depend on."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

READ = frozenset({".safetensors", ".bin", ".pt", ".pth", ".json", ".txt", ".model"})
"""Suffixes of files that models, tokenizers and preprocessing are read from."""


def contents_key(*paths: str) -> str:
    """Hash the names and bytes of files, or of those in folders that models are read from; of the hub, the names."""
    total = hashlib.sha256()
    for path in paths:
        here = Path(path)
        found = [here] if here.is_file() else sorted(f for f in here.glob("*") if f.suffix in READ and f.is_file())
        lines = [f"{file.name} {_digest(file, (stat := file.stat()).st_size, stat.st_mtime_ns)}" for file in found]
        total.update("\n".join([*(lines or [path]), ""]).encode())
    return total.hexdigest()


@cache
def _digest(file: Path, size: int, changed: int) -> str:
    """Return the sha256 of a file, read once while its size and time of modification stay."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
