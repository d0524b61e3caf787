"""The two files of the newest stack name what corefit and streaming need."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
STREAMING = "mosaicml-streaming"
SCRIPTS = {"convert", "converters", "simulation"}
"""Folders of streaming that nothing imports unless it is called for."""
PACKAGES = {"PIL": "pillow", "snappy": "python-snappy", "streaming": STREAMING}
"""Packages by the names under which they are imported, where these differ."""


def names(lines: list[str]) -> set[str]:
    """The packages of requirements, without comments and options."""
    found = (re.match(r"[a-z0-9-]+", line) for line in lines)
    return {match[0] for match in found if match and not match[0].startswith("-")}


def required() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return names([*project["dependencies"], *project["optional-dependencies"]["hub"]]) - {"corefit"}


def listed(file: str) -> set[str]:
    return names((ROOT / "ci" / file).read_text().splitlines())


def test_each_dependency_is_in_the_list_for_pip():
    """pip installs streaming without its dependencies, so what corefit needs has to be listed."""
    assert required() - {STREAMING} <= listed("newest-pip.txt") | listed("newest.txt")
    assert STREAMING not in listed("newest-pip.txt")
    assert listed("newest.txt") <= required()


def test_what_streaming_imports_is_in_the_list_for_pip():
    """Whatever is imported at the top of its modules; clients of object stores are imported inside functions."""
    folder = Path(importlib.util.find_spec("streaming").origin).parent
    files = [f for f in folder.rglob("*.py") if not SCRIPTS & {*f.relative_to(folder).parts}]
    found = {name for file in files for name in imported(ast.parse(file.read_text()))} - sys.stdlib_module_names
    assert {"brotli", "snappy", "xxhash", "torchvision"} <= found
    packages = listed("newest-pip.txt") | listed("newest.txt") | {STREAMING, "typing-extensions"}  # the latter: torch's
    assert {PACKAGES.get(name, name.replace("_", "-")) for name in found} <= packages


def imported(tree: ast.Module) -> set[str]:
    """The packages that a module imports as it is read."""
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in names}
