"""Which files of a diffusers folder its parts are read from, and how those of a model on the hub are fetched.

Folders on the hub often hold the same weights several times: in other dtypes, as one file and in shards, as pickles,
and as one file of the whole model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath

from corefit.errors import ModelError

WEIGHTS = ".safetensors"
READ = frozenset({".json", ".txt", ".model", WEIGHTS})
"""Suffixes of the files that models and tokenizers are read from; pickles are never read."""
USUAL = re.compile(r"(model|diffusion_pytorch_model)(-\d+-of-\d+)?\.safetensors")
"""The names of weight files, and of their shards, without a variant."""
SHARDS = re.compile(r"-of-(\d+)\.")
"""Finds in a shard's name how many there are."""


def used(files: Iterable[str], library: str, variant: str | None, *, weights: bool = True) -> list[str]:
    """Return those of a part's files that it is read from, by their names in its folder, sorted.

    library  that of the part's class: diffusers reads shards where there is one file too, transformers that file
    weights  whether the weight files are among them
    """
    found = sorted(name for name in files if PurePosixPath(name).suffix in READ)
    stored = [name for name in found if name.endswith(WEIGHTS)]
    kept = _weights(stored, library, variant, any(".index." in name for name in found)) if weights else []
    return [name for name in found if name in kept or name not in stored]


def _weights(stored: Sequence[str], library: str, variant: str | None, indexed: bool) -> Sequence[str]:
    """Return the files of `variant`, or the plain ones if there are none, as one file or as shards with an index."""
    of_variant = [name for name in stored if plain(name, variant) != name and USUAL.fullmatch(plain(name, variant))]
    chosen = of_variant or [name for name in stored if USUAL.fullmatch(name)] or stored
    whole = [name for name in chosen if "-of-" not in name]
    shards = [name for name in chosen if name not in whole]
    if not whole or not shards:
        return chosen
    return whole if library == "transformers" or not indexed else shards


def plain(text: str, variant: str | None) -> str:
    """Return the name of a file without the variant."""
    return text.replace(f".{variant}", "") if variant else text


@cache
def fetched_json(name: str, revision: str | None) -> Path:
    """Fetch the JSON files of a model, and return its folder; ModelError if the hub does not give them."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json"]))
    except (OSError, ValueError) as e:
        raise ModelError(f"{name}: no such folder here, and the hub did not give a model: {e}") from e


@cache
def fetched(
    name: str, revision: str | None, variant: str | None, parts: tuple[tuple[str, str], ...], without: str | None
) -> Path:
    """Fetch the files that the parts of a model are read from, and return its folder.

    What was fetched before is found again where the hub cannot be reached. ModelError if the files are not to be had.

    parts    the folder and the library of each part
    without  the part whose weights are not read
    """
    from huggingface_hub import HfApi, snapshot_download

    wanted = ["model_index.json"]
    try:
        there = HfApi().list_repo_files(name, revision=revision)
        for part, library in parts:
            own = [file.removeprefix(f"{part}/") for file in there if file.startswith(f"{part}/")]
            wanted += [f"{part}/{file}" for file in used(own, library, variant, weights=part != without)]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as e:  # each version of the hub's client has the exceptions of another HTTP library
        with suppress(OSError, ValueError):
            before = Path(snapshot_download(name, revision=revision, local_files_only=True))
            weighty = [(part, library) for part, library in parts if part != without]
            if all((before / file).is_file() for file in wanted) and _has_weights(before, weighty, variant):
                return before
        raise ModelError(f"{name}: the hub did not give its weights: {e}") from e


def _has_weights(folder: Path, parts: Iterable[tuple[str, str]], variant: str | None) -> bool:
    """Return whether a folder has the weights of all parts that are models, every shard of them."""
    for part, library in parts:
        if not (folder / part / "config.json").is_file():
            continue
        names = used((file.name for file in (folder / part).iterdir()), library, variant)
        stored = [name for name in names if name.endswith(WEIGHTS)]
        if len(stored) < max((int(found[1]) for name in stored if (found := SHARDS.search(name))), default=1):
            return False
    return True
