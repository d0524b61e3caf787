"""The files of published models: found in a local folder or on the hub, and read without running a pickle's code."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corefit.errors import ModelError, short_repr

if TYPE_CHECKING:
    from torch import Tensor

NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""A name on the hub, such as openai/clip-vit-large-patch14."""
TENSORS = {".safetensors", ".pt", ".pth", ".bin"}
"""Suffixes of files that hold tensors."""
SMALL = ("*.json", "*.txt", "*.model")
"""Files of a folder on the hub that hold no weights."""
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files from which transformers loads a model, the first that is there."""
LONGEST_HEADER = 100_000_000
"""Bytes of the header of a .safetensors file; a larger one is refused by the library too."""


def local(path: str, key: str = "path") -> Path | None:
    """Return the folder or file at `path`, or None if it is a name on the hub; ModelError if it is neither."""
    found = Path(path)
    try:
        if found.exists():
            return found
    except OSError as error:
        raise ModelError(f"{key} = {short_repr(path)}: no such folder: {error.strerror}") from None
    if not NAME.fullmatch(path):
        raise ModelError(f"{key} = {short_repr(path)}: no such folder, and not a name on the hub, organization/model")
    return None


def check_folder(path: str, files: Sequence[Sequence[str]], key: str = "path") -> None:
    """Raise ModelError where a local folder lacks a file; a name on the hub is not looked up.

    files  of each of these groups, one file must be there
    """
    folder = local(path, key)
    if folder is None:
        return
    if folder.is_file():
        raise ModelError(f"{key} = {short_repr(path)} is a file; name the folder that it is in")
    for names in files:
        if not any((folder / name).is_file() for name in names):
            raise ModelError(f"{folder}: it has no {' or '.join(names)}; copy the model's whole folder")


def folder(path: str, patterns: Sequence[str], key: str = "path") -> Path:
    """Return a local folder, or the files of a hub's folder that match `patterns`, which are fetched if need be."""
    return local(path, key) or _fetched(path, tuple(patterns))


def weights_folder(path: str) -> Path:
    """Return the folder of a transformers model, with its weights: .safetensors where there are some."""
    here = local(path)
    if here is not None:
        return here
    found = folder(path, (*SMALL, "model*.safetensors"))
    return found if any(found.glob("model*.safetensors")) else folder(path, (*SMALL, "pytorch_model*.bin"))


def find(path: str, names: Sequence[str], key: str = "path", *, fetch: bool = True) -> Path | None:
    """Return a file of tensors: `path` itself, or the first of `names` in a local folder or in a folder on the hub.

    Raises ModelError where there is none, or where the file is not one of tensors by its name or beginning.

    fetch  whether a file on the hub is fetched; without it, None is returned for one
    """
    here = local(path, key)
    if here is None:
        return _fetched_file(path, tuple(names)) if fetch else None
    found = here if here.is_file() else next((here / name for name in names if (here / name).is_file()), None)
    if found is None:
        raise ModelError(f"{key} = {short_repr(path)}: the folder has no {' or '.join(names)}; copy the weights there")
    if found.suffix not in TENSORS:
        raise ModelError(f"{found}: {key} must name a file of weights, which end in {', '.join(sorted(TENSORS))}")
    header(found)
    return found


def header(file: Path) -> Mapping[str, Any] | None:
    """Return names, shapes and dtypes of a .safetensors file without reading its tensors; None for a pickled file.

    Raises ModelError for what is neither.
    """
    try:
        with file.open("rb") as opened:
            if file.suffix != ".safetensors":
                if not zipfile.is_zipfile(file) and opened.read(1) != b"\x80":
                    raise ModelError(f"{file}: not a file that torch.save wrote; fetch it again")
                return None
            size = int.from_bytes(opened.read(8), "little")
            if size > LONGEST_HEADER:
                raise ValueError("its header is too long")
            found = json.loads(opened.read(size))
    except (ValueError, UnicodeDecodeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{file}: not a .safetensors file ({error}); fetch it again") from None
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from None
    return {name: value for name, value in found.items() if name != "__metadata__"}


def tensors(file: Path, *, blank: bool = False) -> dict[str, Tensor]:
    """Read the tensors of a file by their names; those under "state_dict", if the file has such an entry.

    Raises ModelError for a damaged file, and for one that holds more than tensors, whose code would have to be run.

    blank  give tensors on the meta device, which have shapes and dtypes but no values
    """
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    place = "meta" if blank else "cpu"
    try:
        if file.suffix == ".safetensors":
            return {name: t.to(place) for name, t in load_file(file).items()}
        found = torch.load(file, map_location=place, weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError:
        raise ModelError(
            f"{file}: it holds more than tensors, and to read that would run its code; "
            "save its state_dict again, with safetensors.torch.save_file"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise ModelError(f"{file}: damaged, or not a file of tensors ({error}); fetch it again") from None
    found = found.get("state_dict", found) if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping) or not all(isinstance(t, torch.Tensor) for t in found.values()):
        raise ModelError(f"{file}: a {type(found).__name__} that is no mapping of names to tensors")
    return {str(name).removeprefix("module."): t for name, t in found.items()}


def settings(file: Path) -> Mapping[str, Any]:
    """Read a JSON object; ModelError for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file.parent}: it has no {file.name}; copy the model's whole folder") from None
    except ValueError as error:
        raise ModelError(f"{file}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{file}: a JSON {type(found).__name__}, not an object; copy the file again")
    return found


def stamps(path: str) -> Sequence[tuple[str, int, int]]:
    """Return name, size and time of modification of a local file, or of the files of a folder; nothing for others."""
    here = Path(path)
    found = [here] if here.is_file() else sorted(here.glob("*")) if here.is_dir() else []
    return [(file.name, stat.st_size, stat.st_mtime_ns) for file in found if (stat := file.stat())]


@cache
def _fetched(name: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        raise _not_given(name, error) from error


@cache
def _fetched_file(name: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    problem: Exception = FileNotFoundError(f"it has no {' or '.join(files)}")
    for cached, file in product((True, False), files):
        try:
            return Path(hf_hub_download(name, file, local_files_only=cached))
        except LocalEntryNotFoundError as error:
            problem = problem if cached else error
        except EntryNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise _not_given(name, error) from error
    raise _not_given(name, problem)


def _not_given(name: str, error: Exception) -> ModelError:
    first = str(error).strip().partition("\n")[0]
    return ModelError(
        f"{name}: no such folder here, and the hub did not give the model ({first}); on a machine without network, "
        f"fetch it elsewhere with 'hf download {name}' and name the folder"
    )
