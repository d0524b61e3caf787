"""Tar files in the layout of webdataset: members of one name, told apart by their suffixes."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from attrs import field, frozen

from corefit.errors import DataError
from corefit.sources.media import MEDIA
from corefit.types import Example, Source, Stored

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@frozen
class WebDataset(Source):
    """Shards such as data-{000..127}.tar: 0001.jpg with 0001.txt or 0001.json, whose other keys become `meta`."""

    path: Path
    """One tar, or several: {000..127} counts, * matches."""
    prompt: str = "prompt"
    """The key of the .json that holds the prompt, or a list of captions; a .txt is the prompt itself."""
    _shards: dict[Path, list[Example]] = field(init=False, factory=dict[Path, list[Example]], eq=False, repr=False)

    def examples(self) -> Iterator[Example]:
        """All samples in the order of shards and members; bytes of media are read when they are asked for."""
        for shard in self._files():
            if shard not in self._shards:
                self._shards[shard] = list(self._read(shard))
            yield from self._shards[shard]

    def _files(self) -> list[Path]:
        files = [file for name in _counted(str(self.path)) for file in _matching(Path(name))]
        if missing := [str(file) for file in files if not file.is_file()] or ([str(self.path)] if not files else []):
            raise DataError(f"{missing[0]}: no such tar file; `path` must name one, or several with {{000..127}} or *")
        return files

    def _read(self, shard: Path) -> Iterator[Example]:
        key, members = "", dict[str, tarfile.TarInfo]()
        try:
            with tarfile.open(shard) as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    name, suffix = _split(member.name)
                    if name != key and members:
                        yield self._example(shard, key, members)
                        members = {}
                    key, members[suffix] = name, member
        except tarfile.TarError as error:
            raise DataError(f"{shard} is damaged or no tar file: {error}; fetch it again") from None
        if members:
            yield self._example(shard, key, members)

    def _example(self, shard: Path, key: str, members: Mapping[str, tarfile.TarInfo]) -> Example:
        where = f"{shard}: {key}"
        texts = {suffix: _bytes(shard, member) for suffix, member in members.items() if suffix in (".txt", ".json")}
        try:
            meta: Any = json.loads(texts.get(".json", b"{}"))
            prompt = texts[".txt"].decode().strip() if ".txt" in texts else meta.pop(self.prompt)
        except (ValueError, AttributeError) as error:
            raise DataError(f"{where}: its .txt or .json cannot be read ({error})") from None
        except KeyError:
            raise DataError(
                f"{where}: no .txt, and no {self.prompt!r} in its .json; name the key with `prompt`"
            ) from None
        media = [suffix for suffix in members if suffix in MEDIA]
        if len(media) > 1:
            raise DataError(f"{where}: has {' and '.join(media)}, expected one picture or video a sample")
        stored = Stored(f"{where}{media[0]}", _reader(shard, members[media[0]]), shard) if media else None
        return Example(tuple(prompt) if isinstance(prompt, list) else str(prompt), stored, meta)


def _reader(shard: Path, member: tarfile.TarInfo) -> Callable[[], bytes]:
    return lambda: _bytes(shard, member)


def _bytes(shard: Path, member: tarfile.TarInfo) -> bytes:
    with shard.open("rb") as file:
        file.seek(member.offset_data)
        data = file.read(member.size)
    if len(data) != member.size:
        raise DataError(f"{shard}: {member.name} is cut off; fetch the file again")
    return data


def _split(name: str) -> tuple[str, str]:
    """webdataset's: the key ends at the first dot of the last part."""
    folder, slash, file = name.rpartition("/")
    key, dot, suffix = file.partition(".")
    return f"{folder}{slash}{key}", f"{dot}{suffix}".lower()


def _counted(pattern: str) -> Iterator[str]:
    """{000..127} written out."""
    pieces = RANGE.split(pattern)
    spans = [
        [f"{n:0{len(low)}d}" for n in range(int(low), int(high) + 1)]
        for low, high in zip(pieces[1::3], pieces[2::3], strict=True)
    ]
    for numbers in product(*spans):
        texts = pieces[0::3]
        yield "".join(a + b for a, b in zip(texts, (*numbers, ""), strict=True))


def _matching(path: Path) -> list[Path]:
    return sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
