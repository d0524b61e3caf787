"""A diffusers folder, on disk or on the hub: how it is checked and read (without torch), hashed and linked."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from attrs import frozen

from corefit.errors import ConfigError, ModelError
from corefit_backbones import hub
from corefit_backbones.hashes import SMALL, digest
from corefit_backbones.single_file import SingleFile

HASHED_AT_ONCE = 4
"""Files that are hashed at the same time."""
NAMED = 80
"""Characters of a path that a message shows at most."""
COMPONENT = re.compile(r"(transformer|vae|text_encoder|tokenizer|scheduler)(_\d+)?")
"""Names in model_index.json that are components and not settings."""


@frozen
class Checkpoint:
    """A model as the keys of `[backbone]` name it.

    family    the pipeline class that its model_index.json must name
    path      a diffusers folder, or "organization/model" on the hub
    revision  branch, tag or commit on the hub
    variant   which weight files are read: "fp16" reads model.fp16.safetensors
    single    the file that the transformer is read from, in place of those in its folder
    """

    family: str
    path: str
    revision: str | None = None
    variant: str | None = None
    single: SingleFile | None = None

    @cached_property
    def index(self) -> Mapping[str, bool]:
        """For each component, whether the model has it; SD3 may leave out its T5.

        ModelError for a component whose folder is missing.
        """
        folder = _described(self.path, self.revision)
        found = {name: kind is not None for name, kind in self.classes.items()}
        missing = [name for name, there in found.items() if there and not (folder / name).is_dir()]
        if missing:
            raise ModelError(f"{folder}: model_index.json names {', '.join(missing)}: no such folder in it")
        return found

    @cached_property
    def classes(self) -> Mapping[str, tuple[str, str] | None]:
        """For each component its (library, class), or None if it is left out; ModelError for any other value."""
        file, found = _described(self.path, self.revision) / "model_index.json", dict[str, tuple[str, str] | None]()
        for name, value in self.settings.items():
            if named := _named(value):
                found[name] = None if None in named else named
            elif COMPONENT.fullmatch(name):
                raise ModelError(f"{file}: {name} is {value!r}; [library, class] is expected, or [null, null] for none")
        return found

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The content of model_index.json; ModelError if it names another family."""
        folder = _described(self.path, self.revision)
        index = _json(folder / "model_index.json", "a diffusers folder has one beside its component folders")
        _check_family(self.path, str(index["_class_name"]), self.family)
        return index

    @property
    def parts(self) -> Sequence[str]:
        """Names of the component folders."""
        return [name for name, there in self.index.items() if there]

    def check_weights(self, *kinds: str) -> None:
        """Raise a ModelError if a part whose name begins with one of `kinds` has no weight files.

        A model on the hub is not checked: its weights are fetched later. Neither is the folder of a transformer that is
        read from another file, which is checked instead.
        """
        if self.single:
            self.single.check([part for part in self.parts if part.startswith("transformer")])
        here = _local(self.path, self.revision)
        if here is None:
            return
        for part in self.parts:
            if part.startswith(kinds) and not self.replaces(part) and not any((here / part).glob("*.safetensors")):
                raise ModelError(f"{here / part}: no .safetensors file; copy the weights there")

    def replaces(self, part: str) -> bool:
        """Whether the weights of `part` are read from another file than those in its folder."""
        return self.single is not None and part == "transformer"

    def weights(self, part: str) -> Path:
        """What the weights of `part` are read from: its folder, or one file; for messages."""
        return self.single.file if self.single and self.replaces(part) else self.folder / part

    def key(self, part: str) -> str:
        """sha256 of the names and contents of all files that a part is read from."""
        if not self.single or not self.replaces(part):
            folder = self.folder / part
            files = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
            return fingerprint(folder, hub.used(files, self._library(part), self.variant))
        config = _described(self.path, self.revision) / part / "config.json"
        return hashlib.sha256("".join(f"{digest(file)}\n" for file in (config, self.single.file)).encode()).hexdigest()

    def config(self, part: str, file: str = "config.json") -> Settings:
        """The JSON settings of one component; ModelError if the model does not have it."""
        if part not in self.parts:
            raise ModelError(f"{self.path}: its model_index.json has no {part}; it has {', '.join(self.parts)}")
        return _json(_described(self.path, self.revision) / part / file, f"{part} cannot be read without it")

    def config_key(self) -> str:
        """sha256 over the names and bytes of model_index.json and of all config files of the parts.

        That of a single file's header follows, which has the names and shapes of its tensors.
        """
        folder, total = _described(self.path, self.revision), hashlib.sha256()
        configs = (file for part in self.parts for file in (folder / part).glob("*config.json"))
        for file in (folder / "model_index.json", *sorted(configs)):
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            total.update(f"{file.relative_to(folder).as_posix()} {content}\n".encode())
        return total.hexdigest() + (f"+{self.single.header_key()}" if self.single else "")

    @property
    def folder(self) -> Path:
        """The folder with all files; those of a model on the hub are fetched now, including weights."""
        here = _local(self.path, self.revision)
        if here is not None:
            return here
        libraries = tuple((part, self._library(part)) for part in self.parts)
        return hub.fetched(self.path, self.revision, self.variant, libraries, "transformer" if self.single else None)

    def link_others(self, target: Path, networks: Sequence[str]) -> None:
        """Link everything but the weights of `networks` into the folder `target`."""
        others = [name for name in self.parts if name not in networks]
        for name in ("model_index.json", *(f"{name}/config.json" for name in networks), *others):
            link(self.folder / name, target / name, self.variant)

    def _library(self, part: str) -> str:
        """The name of the library that has the class of a part."""
        return (self.classes[part] or ("",))[0]


def check_size(size: Sequence[int], unit: int, largest: int) -> tuple[int, int]:
    """(height, width) in pixels; ConfigError unless both are positive multiples of `unit` up to `largest`."""
    if len(size) != 2:
        raise ConfigError(f"size = {list(size)}: this model makes images, whose size is [height, width]")
    for name, n in zip(("height", "width"), size, strict=True):
        if n % unit or not unit <= n <= largest:
            near = {min(max(m, unit), largest) for m in (n // unit * unit, -(-n // unit) * unit)}
            raise ConfigError(
                f"size = {list(size)}: {name} {n} must be a multiple of {unit} from {unit} to {largest} "
                f"for this model; nearest: {' or '.join(map(str, sorted(near)))}"
            )
    return size[0], size[1]


def fingerprint(folder: Path, names: Sequence[str]) -> str:
    """sha256 of the names and contents of files of a folder."""
    files = sorted(folder / name for name in names)
    large = sum(file.stat().st_size > SMALL for file in files) > 1  # threads take longer to start than small files
    with ThreadPoolExecutor(HASHED_AT_ONCE) if large else nullcontext() as pool:  # hashlib lets other threads run
        lines = zip(files, pool.map(digest, files) if pool else map(digest, files), strict=True)
        text = "".join(f"{file.relative_to(folder).as_posix()} {found}\n" for file, found in lines)
    return hashlib.sha256(text.encode()).hexdigest()


def link(source: Path, target: Path, variant: str | None = None) -> None:
    """Hard-link a file, or all files under a folder, to `target`; copy them where the disk has no hard links.

    Weight files of `variant` are linked without the variant in their names, in place of those that have such names,
    so that `target` loads without `variant`.
    """
    files = [f for f in source.rglob("*") if f.is_file()] if source.is_dir() else [source]
    for file in sorted(files, key=lambda f: (hub.plain(f.name, variant) != f.name, f)):
        relative = file.relative_to(source)
        _put(
            file,
            target / relative.with_name(hub.plain(file.name, variant)) if relative.name else target,
            variant,
        )


def _put(file: Path, target: Path, variant: str | None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if file.name.endswith(".json") and target.name != file.name:  # an index, which contains the names of weight files
        target.write_text(hub.plain(file.read_text(encoding="utf-8"), variant), encoding="utf-8")
        return
    try:
        os.link(file.resolve(), target)
    except OSError:
        shutil.copy2(file, target)


def _check_family(path: str, found: str, expected: str) -> None:
    if found == expected:
        return
    from corefit_backbones import FAMILIES

    uses = {kind.pipeline_class: use for use, kind in FAMILIES.items()}
    known = ", ".join(f'{name} (use = "{use}")' for name, use in uses.items())
    hint = f'set use = "{uses[found]}"' if found in uses else f"known families: {known}"
    reads = f'use = "{uses[expected]}"' if expected in uses else "this backbone"
    raise ModelError(f"{path} is a {found}; {reads} reads a {expected}: {hint}")


LONGEST = 100_000
"""Tokens of a prompt at most; no encoder was trained with nearly as many."""
LARGEST = 1_000_000
"""Largest width, number of channels or length that is accepted; no real model has a larger one."""
SIZES = frozenset(
    {
        *("in_channels", "latent_channels", "z_dim", "patch_size", "block_out_channels", "pos_embed_max_size"),
        *("joint_attention_dim", "pooled_projection_dim", "text_dim", "model_max_length"),
        *("num_layers", "num_attention_heads", "attention_head_dim", "sample_size"),
        *("scale_factor_temporal", "scale_factor_spatial"),
    }
)
"""Keys whose values corefit uses in calculations: positive integers, or lists of them."""
LEVELS = frozenset(
    {
        *("shift", "flow_shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
        *("boundary_ratio", "scaling_factor", "shift_factor"),
    }
)
"""Keys whose values must be finite numbers."""


class Settings(dict[str, Any]):
    """A JSON object of a checkpoint.

    A missing key, and a value under SIZES or LEVELS that is not such a number, raise a ModelError that names the file.
    """

    def __init__(self, file: Path, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.file = file

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if (key in SIZES and not _sized(value)) or (key in LEVELS and not _finite(value)):
            raise ModelError(f"{self.file}: {key} is {value!r}; a number is expected: fetch the file again")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or `default` if it is missing or null."""
        return default if super().get(key) is None else self[key]

    def __missing__(self, key: str) -> Any:
        raise ModelError(f"{self.file}: it has no {key!r}; the folder is damaged, or of another version")


def _named(value: Any) -> tuple[Any, Any] | None:
    """(library, class) as in model_index.json, two strings or two nulls; None for anything else."""
    match value:
        case [str() as library, str() as name]:
            return library, name
        case [None, None]:
            return None, None
        case _:
            return None


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _sized(value: Any) -> bool:
    """Whether `value` is a positive integer up to LARGEST, or a list of those."""
    each: Sequence[Any] = value if isinstance(value, list) else [value]
    return bool(each) and all(type(n) is int and 0 < n <= LARGEST for n in each)


def _json(file: Path, why: str) -> Settings:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file.parent}: no {file.name}; {why}") from None
    except ValueError as e:
        raise ModelError(f"{file}: not JSON: {e}") from e
    if not isinstance(values, dict):
        raise ModelError(f"{file}: a JSON {type(values).__name__}, not an object; copy the file again")
    return Settings(file, values)


def _local(path: str, revision: str | None) -> Path | None:
    """The folder, or None if `path` is a name on the hub; ModelError if it is neither."""
    try:
        is_folder, is_file = Path(path).is_dir(), Path(path).is_file()
    except OSError as e:
        raise ModelError(f"path = {path[:NAMED]!r}...: no such folder: {e.strerror}") from e
    if is_file:
        raise ModelError(f"{path} is a file; name the diffusers folder that contains model_index.json")
    if is_folder:
        if revision is not None:
            raise ModelError(f'revision = "{revision}" is for a name on the hub, and {path} is a folder')
        return Path(path)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path):
        raise ModelError(f"{path!r}: no such folder, and not a name on the hub, which is organization/model")
    return None


def _described(path: str, revision: str | None) -> Path:
    """A folder that has at least the model's JSON files."""
    here = _local(path, revision)
    return here if here is not None else hub.fetched_json(path, revision)
