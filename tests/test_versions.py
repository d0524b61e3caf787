"""The two files of the newest stack name what corefit and streaming need."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
STREAMING = "mosaicml-streaming"
IMPORTED = """
import json, sys
import torch, torchvision, transformers
before = {*sys.modules}
import streaming
print(json.dumps(sorted({name.partition(".")[0] for name in {*sys.modules} - before})))
"""


def names(lines: list[str]) -> set[str]:
    """The packages of requirements, without comments and options."""
    found = (re.match(r"[a-z0-9-]+", line) for line in lines)
    return {match[0] for match in found if match and not match[0].startswith("-")}


def required() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return names([*project["dependencies"], *project["optional-dependencies"]["hub"]]) - {"corefit"}


def listed(file: str) -> set[str]:
    return names((ROOT / "ci" / file).read_text().splitlines())
