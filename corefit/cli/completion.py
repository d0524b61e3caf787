"""Shell completion of pipeline files and stages. It runs at every press of Tab, so it is quick and prints no errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem, get_completion_class

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_COREFIT_COMPLETE"
OTHERS = {"pyproject.toml", "ruff.toml", "taplo.toml"}
"""Common TOML files that are no pipelines."""


def script(command: click.Command, shell: str) -> str:
    """Return the script by which `shell` (one of SHELLS) asks `command` for completions."""
    kind = get_completion_class(shell)
    assert kind is not None, "click knows all of SHELLS"
    return kind(command, {}, "corefit", VARIABLE).source()


def pipelines(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete TOML files, also those one folder further down; any file if there are none."""
    typed = Path(incomplete)
    folder, start = (typed, "") if not incomplete or incomplete.endswith("/") else (typed.parent, typed.name)
    found = [str(file) for file in _tomls(folder, start)]
    return [CompletionItem(name) for name in found] or [CompletionItem(incomplete, type="file")]


def stages(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the stages of the pipeline on the command line; nothing if it cannot be read."""
    pipeline = ctx.params.get("pipeline")
    if ctx.get_parameter_source("pipeline") is ParameterSource.DEFAULT:
        # click stops at an option whose value is being typed, so PIPELINE may be among the words left over
        pipeline = next(iter(ctx.args), pipeline)
    return [CompletionItem(name) for name in _stages(pipeline) if name.startswith(incomplete)]


def _tomls(folder: Path, start: str) -> Iterator[Path]:
    try:
        entries = sorted(path for path in folder.iterdir() if path.name.startswith(start))
    except OSError:
        return
    visible = [path for path in entries if start or not path.name.startswith(".")]
    for path in visible:
        yield from (file for file in [path, *path.glob("*.toml")] if file.suffix == ".toml" and file.name not in OTHERS)


def _stages(pipeline: Any) -> Iterator[str]:
    import tomllib

    try:
        tables = tomllib.loads(Path(pipeline).read_text(encoding="utf-8-sig"))
    except (OSError, TypeError, ValueError, RecursionError):
        return
    listed: Any = tables.get("stage")
    for stage in cast("list[Any]", listed) if isinstance(listed, list) else []:
        name: Any = cast("dict[str, Any]", stage).get("name") if isinstance(stage, dict) else None
        if isinstance(name, str):
            yield name
