"""What a source holds, without decoding any of it: how many examples, a hash of them, what is missing."""

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
from corefit.errors import DataError, is_unicode
from corefit.system import files
from corefit.system.files import sha256
from corefit.system.ranks import alive
from corefit.types import ArchiveMember, Example, Source
from corefit.types.blame import require_result

SETTLED = 2_000_000_000
"""Nanoseconds after which a file's time stamps tell it from any later version."""


def survey(data: Data, media: bool, digest: Callable[[Any], str]) -> tuple[int, str]:
    """Number and hash of all examples; media are ignored unless asked for."""
    total, number = hashlib.sha256(), 0
    bare: list[str] = []
    missing: list[str] = []
    for number, example in enumerate(_examples(data.raw), 1):
        if media and example.media is None:
            bare.append(f"example {number}: {example.prompts[0]!r}")
        if media and isinstance(example.media, Path) and not _exists(example.media):
            missing.append(f"{example.media}: no such file")
        content = ""
        if media and not bare and len(missing) <= data.skip:
            try:
                content = digest(example.media)
            except DataError as error:  # of an archive that is cut off, or a row without its image
                missing.append(str(error))
        total.update(_line(number, example, content))
    if bare:
        raise DataError(f"{len(bare)} of {number} examples have no media, and a stage needs them:\n{listed(bare)}")
    if number == 0:
        raise DataError(f"the source {type(data.raw).__name__} has no examples")
    check_readable(missing, number, data.skip)
    return number, total.hexdigest()


def _examples(source: Source) -> Iterator[Example]:
    """What a source gives; PluginError where that is no example, or one whose prompt is no text."""
    given = source.examples()
    require_result(given, lambda it: isinstance(it, Iterable), source, "examples()", "an iterable of corefit.Example")
    for example in given:
        require_result(
            example,
            _is_example,
            source,
            "an example",
            "a corefit.Example with a prompt, or several, and media that are a Path, ArchiveMember, an array or None",
        )
        yield example


def _is_example(value: Any) -> bool:
    if not isinstance(value, Example):
        return False
    prompts: Any = (value.prompt,) if isinstance(value.prompt, str) else value.prompt
    meta: Any = value.meta
    media = value.media is None or isinstance(value.media, (Path, ArchiveMember)) or hasattr(value.media, "tobytes")
    fine = media and isinstance(prompts, Sequence) and len(cast(Any, prompts)) > 0 and isinstance(meta, Mapping)
    return fine and all(isinstance(text, str) and is_unicode(text) for text in cast(Any, prompts))


def _exists(file: Path) -> bool:
    try:
        return file.exists()
    except (OSError, ValueError):  # of a name that is too long or holds NUL
        return False


def _line(number: int, example: Example, content: str) -> bytes:
    try:
        return json.dumps([example.prompts, dict(example.meta), content], sort_keys=True).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise DataError(f"the meta of example {number} ({example.prompts[0]!r}) is not JSON: {error}") from None


def check_readable(failed: Sequence[str], total: int, skip: int) -> None:
    if len(failed) > skip:
        raise DataError(too_many(failed, total, skip))
    if len(failed) == total:
        raise DataError(f"none of the {total} media can be read:\n{listed(failed)}")


def too_many(failed: Sequence[str], total: int, skip: int) -> str:
    return (
        f"{len(failed)} of {total} media are missing or unreadable, and {skip} may be skipped:\n{listed(failed)}\n"
        f"repair them, or set skip = {len(failed)} under [data] to leave them out"
    )


@define
class Hashes:
    """sha256 of media; those of files are remembered in `file`, by size and time stamps."""

    file: Path
    known: dict[str, list[Any]] = field(init=False, factory=dict[str, list[Any]])
    changed: bool = field(init=False, default=False)

    def __attrs_post_init__(self) -> None:
        with suppress(FileNotFoundError, files.Damaged):  # without it, everything is read once more
            self.known = files.read_json(self.file)["media"]

    def of(self, media: Path | ArchiveMember | Any) -> str:
        """Of a file, of all files in a folder, of what is stored in an archive, or of an array."""
        if isinstance(media, ArchiveMember):
            return self._known(media.name, media.file, lambda: hashlib.sha256(media.read()).hexdigest())
        if not isinstance(media, Path):
            return hashlib.sha256(f"{media.dtype} {media.shape} ".encode() + media.tobytes()).hexdigest()
        if _exists(media) and media.is_dir():
            files = sorted(file for file in media.iterdir() if file.is_file())
            return hashlib.sha256("".join(f"{file.name} {self._file(file)}\n" for file in files).encode()).hexdigest()
        return self._file(media) if _exists(media) and media.is_file() else "missing"

    def _file(self, file: Path) -> str:
        return self._known(str(file), file, lambda: sha256(file))

    def _known(self, name: str, file: Path, digest: Callable[[], str]) -> str:
        """What was remembered since `file` last changed, or found anew."""
        stat = file.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        *before, found = self.known.get(name, [""])
        if before == stamp:
            return found
        found = digest()
        if time.time_ns() - max(stamp[1:]) > SETTLED:
            self.known[name], self.changed = [*stamp, found], True
        return found

    def save(self) -> None:
        """Keep what was hashed."""
        if not self.changed:
            return
        for left in self.file.parent.iterdir():
            owner = re.fullmatch(rf"\.?{self.file.stem}\.(\d+)(\.part)?", left.name)
            if owner and not alive(int(owner[1])):
                left.unlink(missing_ok=True)
        temporary = self.file.with_suffix(f".{os.getpid()}")
        files.write_json(temporary, {"media": self.known})
        temporary.replace(self.file)
