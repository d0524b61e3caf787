"""Checks that all ranks of a run have the same pipeline, code and versions; otherwise all of them end at once.

Each process reads the pipeline and imports the plugins itself, perhaps from the disk of another machine. Ranks that
differ would train on something that nobody asked for, or wait for each other forever.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import corefit
from corefit.errors import ConfigError
from corefit.system.files import portable
from corefit.system.ranks import Ranks

if TYPE_CHECKING:
    from corefit.pipeline.evaluation import Evaluation
    from corefit.pipeline.pipeline import Pipeline

Facts = Mapping[str, str]
"""What a rank has, key -> value, both as messages show them."""
VERSIONS = ("torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "numpy", "safetensors")
PATHS = ("out", "plugins", "backbone.path", "backbone.transformer")
"""Keys that may differ because they are paths on a machine. The content of plugin files and weights is compared."""
NAMED = 3
"""How many differences a message names; the rest is counted."""


def check(ranks: Ranks, pipeline: Pipeline | Evaluation, command: str) -> None:
    """Raise ConfigError on all ranks if the pipeline, command, code, versions or launch of one differ from rank 0's."""
    mine = ranks.all_or_none(lambda: dict(_facts(ranks, pipeline, command))) if ranks.world > 1 else {}
    refuse_differences(ranks, mine)


def refuse_differences(ranks: Ranks, mine: Facts) -> None:
    """Raise ConfigError on all ranks if a value of one of them differs from rank 0's."""
    rank_0, *rest = ranks.all_gather_object(mine)
    found = [
        _difference(rank, key, facts, rank_0) for rank, facts in enumerate(rest, 1) for key in _differing(facts, rank_0)
    ]
    if found:
        more = f", and {len(found) - NAMED} more" if len(found) > NAMED else ""
        raise ConfigError(
            f"{', '.join(found[:NAMED])}{more}: all processes of a run must read the same pipeline with the same "
            "plugins and versions; start them with one command, from one environment"
        )


def _differing(facts: Facts, rank_0: Facts) -> list[str]:
    return [key for key in dict.fromkeys([*facts, *rank_0]) if facts.get(key) != rank_0.get(key)]


def _difference(rank: int, key: str, facts: Facts, rank_0: Facts) -> str:
    return f"rank {rank} has {key} = {facts.get(key, 'nothing')}, rank 0 has {rank_0.get(key, 'nothing')}"


def _facts(ranks: Ranks, pipeline: Pipeline | Evaluation, command: str) -> Iterator[tuple[str, str]]:
    yield "command", command
    yield from _keys("", portable(pipeline.tables(), pipeline.folder))
    yield "processes", str(ranks.world)
    yield "sharding", str(ranks.sharded)
    yield "arithmetic", ranks.accelerator.mixed_precision
    yield "device", ranks.device.type
    yield "python", ".".join(platform.python_version_tuple()[:2])
    yield "corefit", corefit.__version__
    yield from ((name, metadata.version(name)) for name in VERSIONS)
    yield from _code(pipeline)


def _keys(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield (key as --set writes it, value); entries of a list go by their name, or by their `use`."""
    if path in PATHS:
        return
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        names = [str(item.get("name", item.get("use", number))) for number, item in enumerate(value)]
        yield path, ", ".join(names)
        unique = len(set(names)) == len(names)
        value = {name if unique else str(n): item for n, (name, item) in enumerate(zip(names, value, strict=True))}
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _keys(f"{path}.{key}".strip("."), inner)
    else:
        yield path, str(value)


def _code(pipeline: Pipeline | Evaluation) -> Iterator[tuple[str, str]]:
    """Yield ("code of NAME", hash) for corefit itself and for every plugin."""
    host = pipeline.host
    yield "code of corefit", _hash(Path(corefit.__file__))
    for plugin in host.registered():
        module = getattr(plugin, "__name__", type(plugin).__module__)
        top = module.partition(".")[0]
        file = getattr(sys.modules.get(top), "__file__", None)
        if top != "corefit" and file:
            path = Path(file).resolve()
            yield f"code of {os.path.relpath(path, pipeline.folder) if path in host.files else top}", _hash(path)


def _hash(file: Path) -> str:
    """Return a short hash of the Python files of a package, or of the one file of a module."""
    files = sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files if f.is_file())).hexdigest()[:12]
