"""Estimates of memory that were made before, in .corefit/estimates/, used while everything that determines them stays.

To make one takes seconds, most of them for importing torch and diffusers; to find one takes neither.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attrs
from attrs import field, frozen

from corefit.pipeline.pipeline import Pipeline
from corefit.system import files
from corefit.train.estimate import Device, Estimate
from corefit.train.frozen import sized_rewards
from corefit.types import Configured
from corefit.types.blame import GROUP, LOCAL

FOLDER = ".corefit/estimates"
INIT = "__init__.py"
MOST = 100
"""Files that are kept, the newest."""
SETTLED = 2.0
"""Seconds: a file that changed later before the start may have been read as it was before."""
INSTALLED = (".dist-info", ".egg-info")
"""How the folders end that installers leave beside packages, with name and version in their names."""
LIBRARIES = ("TORCH", "PYTORCH", "DIFFUSERS", "TRANSFORMERS", "PEFT", "ACCELERATE")
"""How variables begin in which the libraries that make a network are told to make it otherwise."""


@frozen
class Kept:
    """The file for the estimates of one pipeline on one device; None where what determines them is not known.

    configured  the backbone and the rewards whose networks are counted
    config      what their `config_key` gave
    path        sys.path before they are made, which is that of the next process; torch adds a temporary folder to it
    begun       when it was asked for, in seconds since the epoch
    """

    file: Path | None
    configured: Sequence[Configured] = ()
    config: Sequence[str] = ()
    path: tuple[str, ...] = field(init=False, factory=lambda: tuple(sys.path))
    begun: float = field(init=False, factory=time.time)

    @staticmethod
    def of(pipeline: Pipeline, device: Device, world: int = 1, *, graphs: bool = True) -> Kept:
        """The file whose name is the hash of all that determines `estimate.estimates` of these, but for code.

        The code is in the file, since only who has made an estimate knows what that took.
        """
        found: list[Any] = [pipeline.backbone, *sized_rewards(pipeline)]
        configured = [each for each in found if isinstance(each, Configured)]
        if len(configured) < len(found):
            return Kept(None)
        config = [each.config_key() for each in configured]
        parts = {
            "pipeline": pipeline.tables(),
            "config": config,
            "device": {**attrs.asdict(device), "half": device.half(pipeline.precision)},
            "world": world,
            "graphs": graphs,
            "offers": [
                [kind, name, offer.owner, offer.cls.__module__, offer.cls.__qualname__]
                for kind, offers in pipeline.host.offers.items()
                for name, offer in offers.items()
            ],
            "python": [sys.version, platform.machine()],
            "variables": {name: value for name, value in os.environ.items() if name.startswith(LIBRARIES)},
            "path": sys.path,
            "installed": sorted(_installed()),
        }
        digest = files.json_digest(json.loads(json.dumps(parts, default=str)))
        return Kept(pipeline.folder / FOLDER / f"{digest[:32]}.json", configured, config)

    def read(self) -> list[Estimate] | None:
        """The estimates; None where there are none, the file is damaged, or the code is not what made them."""
        if self.file is None:
            return None
        try:
            content = files.read_json(self.file)
            fits = {name: _source(name) for name in content["code"]} == content["code"]
            return [Estimate(**each) for each in content["estimates"]] if fits else None
        except (OSError, ValueError):
            return None

    def write(self, found: Sequence[Estimate]) -> None:
        """Keep estimates that this process has just made; where that cannot be, they are made again next time.

        They are not kept where a file changed meanwhile: whether it was read before that or after is not known.
        """
        if self.file is None:
            return
        loose = {name: _files(name) for name in _loose(self.path)}
        changed = max(f.stat().st_mtime for each in loose.values() for file in each for f in files.sources(file))
        if changed > self.begun - SETTLED or [each.config_key() for each in self.configured] != self.config:
            return
        content = {"code": {name: _source(name) for name in loose}, "estimates": [attrs.asdict(each) for each in found]}
        with suppress(OSError):
            files.write_json(self.file, content)
            for old in sorted(self.file.parent.iterdir(), key=lambda file: file.stat().st_mtime)[:-MOST]:
                old.unlink(missing_ok=True)


def _installed() -> Iterator[tuple[str, int]]:
    """Name, version and time of every installation that Python would import from."""
    for folder in dict.fromkeys(sys.path):
        with suppress(OSError), os.scandir(folder or ".") as entries:
            yield from ((e.path, e.stat().st_mtime_ns) for e in entries if e.name.endswith(INSTALLED))


def _loose(path: Sequence[str]) -> Iterator[str]:
    """Packages and modules in this process that may change while their versions stay.

    They are corefit and its plugins, and what lies where nothing was installed: editable installs, local files. What
    lies in a folder that was added to `path` meanwhile is left out: the next process may not have it.
    """
    yield from {point.module.partition(".")[0] for point in entry_points(group=GROUP)}
    added = {Path(folder) for folder in {*sys.path} - {*path}}
    for name in {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names:
        found = {file.parent.parent if file.name == INIT else file.parent for file in _files(name)} - added
        if not all(_has_installations(folder) for folder in found):
            yield name


@cache
def _has_installations(folder: Path) -> bool:
    try:
        return any(name.endswith(INSTALLED) for name in os.listdir(folder))
    except OSError:
        return True  # of what is built in, and has no file


def _source(name: str) -> str:
    """Hash of a package's or module's source as Python would find it now."""
    return " ".join(files.source(file) for file in _files(name))


def _files(name: str) -> Sequence[Path]:
    """The file of a module; __init__.py of a package, there or not, in each folder that the package consists of.

    None of what an import would not find, as of modules that others have put into sys.modules.
    """
    spec = find_spec(name) if name.startswith(LOCAL) else _found(name)
    if spec is None:
        return ()
    if spec.origin is not None:
        return (Path(spec.origin),)
    return [Path(folder) / INIT for folder in spec.submodule_search_locations or ()]


def _found(name: str) -> ModuleSpec | None:
    """What an import would find, whether or not it is imported."""
    specs = (finder.find_spec(name, None) for finder in sys.meta_path)
    return next((spec for spec in specs if spec is not None), None)
