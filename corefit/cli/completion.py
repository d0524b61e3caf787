"""What a shell completes: pipeline files and stages of one. Read on every key press, so quick and silent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import click
from click.shell_completion import CompletionItem, get_completion_class

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_COREFIT_COMPLETE"
OTHERS = {"pyproject.toml", "ruff.toml", "taplo.toml"}
"""TOML files that are no pipelines."""


def script(command: click.Command, shell: str) -> str:
    """What makes `shell` (of SHELLS) ask `command` for completions."""
    kind = get_completion_class(shell)
    assert kind is not None, "click knows all of SHELLS"
    return kind(command, {}, "corefit", VARIABLE).source()


def pipelines(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """TOML files beginning so, also those one folder further down; any files where there are none."""
    typed = Path(incomplete)
    folder, start = (typed, "") if not incomplete or incomplete.endswith("/") else (typed.parent, typed.name)
    found = [str(file) for file in _tomls(folder, start)]
    return [CompletionItem(name) for name in found] or [CompletionItem(incomplete, type="file")]


def stages(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of the stages of the pipeline that is named before; none where it cannot be read."""
    # click stops at an option whose value is being typed, so PIPELINE is still among the words left over
    pipeline = ctx.params.get("pipeline") or next(iter(ctx.args), None)
    return [CompletionItem(name) for name in _stages(pipeline) if name.startswith(incomplete)]


def _tomls(folder: Path, start: str) -> Iterator[Path]:
    try:
        entries = sorted(path for path in folder.iterdir() if path.name.startswith(start))
    except OSError:
        return
    shown = [path for path in entries if start or not path.name.startswith(".")]
    for path in shown:
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
