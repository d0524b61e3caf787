"""The folder of a run or an evaluation: locked while one of them works there, with the file that says what it is."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

from corefit.errors import ConfigError
from corefit.system import files
from corefit.system.homes import Homes
from corefit.system.ranks import Ranks


@contextlib.contextmanager
def locked(folder: Path, ranks: Ranks) -> Generator[None]:
    """Lock the run's folder against a second run; the lock ends with the process, however that ends."""
    with contextlib.ExitStack() as held:

        def lock() -> bool:
            if not ranks.main:
                return True
            try:
                with files.explain_write_errors(folder):
                    folder.mkdir(parents=True, exist_ok=True)
            except FileNotFoundError as error:  # on a file system such as /proc
                raise ConfigError(
                    f"{folder} cannot be made ({error.strerror}); name another place with --out"
                ) from error
            return held.enter_context(files.locked(folder / ".lock", wait=False))

        if not ranks.broadcast_object(ranks.all_or_none(lock)):
            raise ConfigError(
                f"another process is running in {folder}; wait for it, or give this run another name or --out"
            )
        yield


def refuse_homes(homes: Homes, folder: Path) -> None:
    """Raise ConfigError, on all ranks, for what needs a run's folder that all machines share, where they do not."""
    if homes.shared:
        return
    ranks = homes.ranks
    if ranks.sharded:
        raise ConfigError(
            f"with shard = true all processes write the checkpoints together, and not all of them see {folder}; name a "
            "folder with --out that all machines mount, or train without shard"
        )
    begun = ranks.all_gather_object((folder / "pipeline.toml").exists())
    if any(begun) and not begun[0]:
        raise ConfigError(
            f"rank {begun.index(True)} has this run's folder {folder} on its machine, and rank 0 has none: it would "
            "begin anew. Start that machine as the first (--node-rank 0), copy the folder to the first, or give this "
            "run another name"
        )


def write_toml(file: Path, tables: Any) -> None:
    """Write tables as TOML, without what TOML lacks."""
    import tomli_w

    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(file, tomli_w.dumps(_for_toml(tables)).encode())


def _for_toml(value: Any) -> Any:
    """Return tables without None, which TOML lacks, and without empty lists."""
    if isinstance(value, dict):
        return {k: _for_toml(v) for k, v in value.items() if v is not None and v != []}
    return [_for_toml(v) for v in value] if isinstance(value, list) else value
