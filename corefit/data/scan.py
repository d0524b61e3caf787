"""Scan a source without decoding media: count its examples, hash them, and find what is missing."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from attrs import define, field

from corefit.data.settings import Data
from corefit.data.sources import listed
from corefit.errors import DataError, Unreachable, is_unicode
from corefit.system import files
from corefit.system.files import sha256
from corefit.system.ranks import alive
from corefit.types import ArchiveMember, Example, Source
from corefit.types.blame import require_result

SETTLED = 2_000_000_000
"""Nanoseconds since its last change after which any later change is sure to show in a file's time stamps."""


def scan(data: Data, media: bool, digest: Callable[[Any], str], extra: Sequence[str] = ()) -> tuple[int, str]:
    """Return the number of examples and a hash of them all, of their media too if `media` is set.

    `extra` names the further media that are needed. DataError for examples that lack media, and for more examples with
    unreadable media than `data.skip` allows.
    """
    total, number = hashlib.sha256(), 0
    without: dict[str, list[str]] = {name: [] for name in ("", *extra)}
    unreadable: list[str] = []
    for number, example in enumerate(map(data.triggered, _checked_examples(data.raw_source)), 1):
        found = {"": example.media, **{name: example.extra.get(name) for name in extra}} if media else {}
        for name in (name for name, one in found.items() if one is None):
            without[name].append(f"example {number}: {example.prompts[0]!r}")
        problems = [f"{one}: no such file" for one in found.values() if isinstance(one, Path) and not _exists(one)]
        contents: dict[str, str] = {}
        if not any(without.values()) and len(unreadable) + len(problems[:1]) <= data.skip:
            try:
                contents = {name: digest(one) for name, one in found.items()}
            except Unreachable:
                raise
            except DataError as error:  # the archive is cut off, or a row lacks its image
                problems.append(str(error))
        unreadable += problems[:1]  # an example is left out as a whole
        total.update(_fingerprint(number, example, contents, extra))
    for name, lacking in without.items():
        if lacking:
            _refuse_lacking(name, lacking, number)
    if number == 0:
        raise DataError(f"the source {type(data.raw_source).__name__} has no examples")
    check_readable(unreadable, number, data.skip)
    return number, total.hexdigest()


def _refuse_lacking(name: str, lacking: Sequence[str], total: int) -> None:
    """Raise DataError for examples, listed in `lacking`, without main media (name "") or without a further medium."""
    if not name:
        raise DataError(f"{len(lacking)} of {total} examples have no media, and a stage needs them:\n{listed(lacking)}")
    remedy = "give each of them one, or leave them out of the data"
    if len(lacking) == total:
        remedy = (
            f'name it in the source: extra = {{ {name} = "KEY" }} for jsonl, parquet and hf_dataset (also `pair`), '
            f'extra = ["{name}"] for imagefolder and webdataset'
        )
    raise DataError(
        f"{len(lacking)} of {total} examples have no {name!r} beside their media, and the objective of a stage reads "
        f"it (media:{name}):\n{listed(lacking)}\n{remedy}"
    )


def _checked_examples(source: Source) -> Iterator[Example]:
    """Yield the examples of a source; PluginError for anything that is not a well-formed example."""
    examples = source.examples()
    require_result(
        examples, lambda it: isinstance(it, Iterable), source, "examples()", "an iterable of corefit.Example"
    )
    for example in examples:
        require_result(
            example,
            _is_example,
            source,
            "an example",
            "a corefit.Example with a prompt, or several, and media that are a Path, ArchiveMember, an array or None; "
            "further media, in `extra`, are not None and have words as names",
        )
        yield example


def _is_example(value: Any) -> bool:
    if not isinstance(value, Example):
        return False
    prompts: Any = (value.prompt,) if isinstance(value.prompt, str) else value.prompt
    meta: Any = value.meta
    extra: Any = value.extra
    media = value.media is None or _is_medium(value.media)
    media = media and isinstance(extra, Mapping) and all(map(_is_further, cast(Any, extra).items()))
    valid = media and isinstance(prompts, Sequence) and len(cast(Any, prompts)) > 0 and isinstance(meta, Mapping)
    return valid and all(isinstance(text, str) and is_unicode(text) for text in cast(Any, prompts))


def _is_medium(value: Any) -> bool:
    return isinstance(value, (Path, ArchiveMember)) or hasattr(value, "tobytes")


def _is_further(item: tuple[Any, Any]) -> bool:
    name, medium = item
    return isinstance(name, str) and name.isidentifier() and _is_medium(medium)


def _exists(file: Path) -> bool:
    """Return whether a file exists; a name that no file can have does not."""
    try:
        return file.exists()
    except (OSError, ValueError):  # the name is too long or contains NUL
        return False


def _fingerprint(number: int, example: Example, contents: Mapping[str, str], extra: Sequence[str]) -> bytes:
    """Return a line with everything that is hashed of an example; `contents` are the digests of its media by name.

    Only if there are further media do they appear, so that caches without any keep the key that version 0.1 gave.
    """
    further = [{name: contents.get(name, "") for name in extra}] if extra else []
    try:
        hashed = [example.prompts, dict(example.meta), contents.get("", ""), *further]
        return json.dumps(hashed, sort_keys=True).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise DataError(f"the meta of example {number} ({example.prompts[0]!r}) is not JSON: {error}") from None


def check_readable(failed: Sequence[str], total: int, skip: int) -> None:
    """Raise DataError if more than `skip` media, or all of them, failed to be read; `failed` has their messages."""
    if len(failed) > skip:
        raise DataError(too_many_unreadable(failed, total, skip))
    if len(failed) == total:
        raise DataError(f"none of the {total} media can be read:\n{listed(failed)}")


def too_many_unreadable(failed: Sequence[str], total: int, skip: int) -> str:
    return (
        f"{len(failed)} of {total} media are missing or unreadable, and {skip} may be skipped:\n{listed(failed)}\n"
        f"repair them, or set skip = {len(failed)} under [data] to leave them out"
    )


def find(media: Path | ArchiveMember | Any) -> str:
    """Look for a medium without reading it; DataError where a store has no such file. Return nothing of it."""
    if isinstance(media, ArchiveMember) and media.version:
        media.version()
    return ""


@define
class MediaHashes:
    """Computes sha256 digests of media, and remembers those of files in `file`, by their size and time stamps."""

    file: Path
    known: dict[str, list[Any]] = field(init=False, factory=dict[str, list[Any]])
    changed: bool = field(init=False, default=False)

    def __attrs_post_init__(self) -> None:
        with suppress(FileNotFoundError, files.Damaged):  # if it is missing or damaged, all media are hashed again
            self.known = files.read_json(self.file)["media"]

    def digest(self, media: Path | ArchiveMember | Any) -> str:
        """Return the digest of a file, of all files in a folder, of an archive member or of an array."""
        if isinstance(media, ArchiveMember):
            return self._member(media)
        if not isinstance(media, Path):
            return hashlib.sha256(f"{media.dtype} {media.shape} ".encode() + media.tobytes()).hexdigest()
        if _exists(media) and media.is_dir():
            files = sorted(file for file in media.iterdir() if file.is_file())
            return hashlib.sha256("".join(f"{file.name} {self._file(file)}\n" for file in files).encode()).hexdigest()
        return self._file(media) if _exists(media) and media.is_file() else "missing"

    def _member(self, media: ArchiveMember) -> str:
        if media.version and (version := media.version()):
            return hashlib.sha256(f"version {version}".encode()).hexdigest()
        if media.file is None:
            return hashlib.sha256(media.read()).hexdigest()
        return self._remembered(media.name, media.file, lambda: hashlib.sha256(media.read()).hexdigest())

    def _file(self, file: Path) -> str:
        return self._remembered(str(file), file, lambda: sha256(file))

    def _remembered(self, name: str, file: Path, digest: Callable[[], str]) -> str:
        """Return the remembered digest if `file` has not changed since, or else a new one."""
        stat = file.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        *former, found = self.known.get(name, [""])
        if former == stamp:
            return found
        found = digest()
        if time.time_ns() - max(stamp[1:]) > SETTLED:
            self.known[name], self.changed = [*stamp, found], True
        return found

    def save(self) -> None:
        """Write the remembered digests to `file`, and remove what processes that have ended left beside it."""
        if not self.changed:
            return
        for stale in self.file.parent.iterdir():
            owner = re.fullmatch(rf"\.?{self.file.stem}\.(\d+)(\.part)?", stale.name)
            if owner and not alive(int(owner[1])):
                stale.unlink(missing_ok=True)
        temporary = self.file.with_suffix(f".{os.getpid()}")
        files.write_json(temporary, {"media": self.known})
        temporary.replace(self.file)
