"""`corefit new example`: the examples that are distributed with corefit, and what to do with a copy of one."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from corefit.errors import ConfigError, near

EXAMPLES: Mapping[str, str] = {
    "digits": "a small Stable Diffusion 3 that writes digits, with its data, its judge and its pipelines",
    "plugin": "ReflexFlow, an objective in a distribution of its own",
}
MADE = {"__pycache__", "build", "compare", "dist", "evals", "runs"}
"""Folders that runs and tools make in an example; hidden ones are left out, too."""


def example(name: str) -> dict[str, Path]:
    """Return the files of an example, by their paths in a copy; ConfigError for an unknown name."""
    if name not in EXAMPLES:
        raise ConfigError(f"there is no example {name!r}{near(name, EXAMPLES)}; there are: {', '.join(EXAMPLES)}")
    folder = _folder() / name
    files = {file.relative_to(folder): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {path.as_posix(): file for path, file in files.items() if not any(map(_is_made, path.parts))}


def _is_made(part: str) -> bool:
    return part in MADE or part.startswith(".")


def _folder() -> Path:
    """Return the examples in the wheel, or those of the checkout that corefit is imported from."""
    package = Path(__file__).parents[1]
    packed = package / "examples"
    return packed if packed.is_dir() else package.parent / "examples"


def steps(name: str, target: str) -> list[str]:
    """Return the commands to type next. `target` is the folder of the copy, quoted for a shell."""
    if name == "plugin":
        return [f"cd {target} && pip install -e '.[test]'", "pytest"]
    install = [] if importlib.util.find_spec("sklearn") else ["pip install 'corefit[examples]'"]
    return [*install, f"cd {target} && corefit run"]
