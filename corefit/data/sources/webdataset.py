"""Source: tar files in the webdataset layout, where a sample is the members with one name and different suffixes."""

from __future__ import annotations

import json
import math
import re
import tarfile
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import IO, Any, cast

from attrs import field, frozen

from corefit.data.sources.captions import parse_captions
from corefit.data.sources.further import check_names
from corefit.data.sources.indexes import remembered
from corefit.data.sources.media import MEDIA
from corefit.data.sources.remote import BLOCKS, Store, check_address, found, is_remote, opened, shown
from corefit.errors import DataError
from corefit.types import ArchiveMember, Example, Source, Url

RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
CHUNK = 1 << 20
TEXTS = (".txt", ".json")
"""Suffixes of captions and metadata, which are read in passing: a store would have to be asked again for each."""
MAX_SHARDS = 1_000_000
"""The most tar files that one pattern may name."""


@frozen
class Member:
    """The position of a file in a tar; `text` is what it holds, for captions and metadata."""

    name: str
    offset: int
    size: int
    text: bytes = b""


Members = Mapping[str, Member]
"""The members of one sample, by suffix."""


@frozen
class Shard:
    """A tar file; of one at an address, `version` is what the store says that identifies its bytes."""

    place: Path | Url
    version: str = ""

    def __str__(self) -> str:
        return shown(self.place)

    def samples(self) -> Mapping[str, Members]:
        """Return the members by key and suffix; those of a tar in a store are read once on a machine."""
        if not self.version:
            return _samples(self)
        found = remembered(f"tar {self.place} {self.version}", lambda: _for_json(_samples(self)))
        return {
            key: {
                suffix: Member(name, offset, size, text.encode("latin-1"))
                for suffix, (name, offset, size, text) in each
            }
            for key, each in found["samples"]
        }

    def bytes(self, member: Member) -> bytes:
        """Return the bytes of a member; DataError where the tar ends before them."""
        if is_remote(self.place):
            data = BLOCKS.read(self.place, self.version, member.offset, member.offset + member.size)
        else:
            with opened(self.place) as file:
                file.seek(member.offset)
                data = file.read(member.size)
        if len(data) != member.size:
            raise DataError(f"{self}: {member.name} is cut off; fetch the file again")
        return data

    def medium(self, name: str, member: Member) -> ArchiveMember:
        """Return a member as a medium, which is read when it is decoded."""
        version = f"{self.version} {member.offset} {member.size}" if self.version else ""
        return ArchiveMember(
            name,
            lambda: self.bytes(member),
            None if is_remote(self.place) else Path(self.place),
            (lambda: version) if is_remote(self.place) else None,
        )


@frozen
class WebDataset(Source):
    """Reads tar files: 0001.jpg with its prompt in 0001.txt or 0001.json, whose other keys become `meta`."""

    path: Path | Url = field(validator=check_address)
    """A tar file, or several, or their address: data-{000..127}.tar names 128 of them, and * matches any text."""
    prompt: str = "prompt"
    """The key in the .json of the prompt, or of a list of captions; a .txt contains the prompt itself."""
    extra: tuple[str, ...] = field(default=(), validator=check_names)
    """Names of further media: with ["rejected"], the member 0001.rejected.jpg belongs to 0001.jpg."""
    _shards: dict[Shard, list[Example]] = field(init=False, factory=dict["Shard", list[Example]], eq=False, repr=False)

    def examples(self) -> Iterator[Example]:
        """Yield all samples, in the order of the shards and of first members; media are read when they are decoded.

        DataError names the shard and the sample, also if a tar is cut off between two members.
        """
        for shard in self._files():
            if shard not in self._shards:
                self._shards[shard] = list(self._read(shard))
            yield from self._shards[shard]

    def _files(self) -> list[Shard]:
        if is_remote(self.path):
            store, names = Store(), _expand_ranges(self.path)
            shards = [Shard(url, store.version(url)) for name in names for url in found(Url(name))]
        else:
            names = _expand_ranges(str(self.path))
            shards = [Shard(file) for name in names for file in _expand_wildcard(Path(name))]
        missing = [str(each) for each in shards if isinstance(each.place, Path) and not each.place.is_file()]
        if missing or not shards:
            name = missing[0] if missing else shown(self.path)
            raise DataError(f"{name}: no such tar file; `path` must name one, or several with {{000..127}} or *")
        return shards

    def _read(self, shard: Shard) -> Iterator[Example]:
        for key, members in shard.samples().items():
            try:
                prompt, meta = self._captions_and_meta(members)
                suffixes = {
                    name: _media_suffix(members, f".{name.lower()}" if name else "") for name in ("", *self.extra)
                }
            except ValueError as error:
                raise DataError(f"{shard}: {key}: {error}") from None
            media = {
                name: shard.medium(f"{shard}: {key}{suffix}", members[suffix])
                for name, suffix in suffixes.items()
                if suffix
            }
            yield Example(prompt, media.pop("", None), meta, media)

    def _captions_and_meta(self, members: Members) -> tuple[str | tuple[str, ...], dict[str, Any]]:
        """Return captions and metadata of a sample; ValueError says what is wrong with them."""
        meta = _parse_object(members[".json"].text) if ".json" in members else {}
        if ".txt" in members:
            return _parse_text(members[".txt"].text), meta
        if self.prompt not in meta:
            raise ValueError(
                f"no .txt, and no {self.prompt!r} in a .json; it has {', '.join([*members, *meta])}: "
                "name the key with `prompt`"
            )
        try:
            return parse_captions(meta.pop(self.prompt)), meta
        except ValueError as error:
            raise ValueError(f"{self.prompt!r} of its .json {error}") from None


def _media_suffix(members: Members, before: str) -> str | None:
    """Return the suffix of a sample's picture or video whose own suffix follows `before`; ValueError for several."""
    found = [suffix for suffix in members if suffix.startswith(before) and suffix[len(before) :] in MEDIA]
    if len(found) > 1:
        raise ValueError(f"has {' and '.join(found)}, expected one picture or video a sample")
    return found[0] if found else None


def _parse_text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"its .txt is not UTF-8 text ({error})") from None


def _parse_object(data: bytes) -> dict[str, Any]:
    try:
        found: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its .json cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"its .json is a {type(found).__name__}, expected an object such as {{...}}")
    return cast(dict[str, Any], found)


def _samples(shard: Shard) -> dict[str, dict[str, Member]]:
    """Return the members by key and suffix, without hidden ones (._1.jpg); DataError for a tar that is not whole."""
    samples: dict[str, dict[str, Member]] = {}
    with opened(shard.place) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    key, suffix = _split(info.name)
                    if info.isdir() or key.rpartition("/")[2] == "":
                        continue
                    if not info.isreg() or info.sparse is not None:
                        raise DataError(
                            f"{shard}: {info.name} is not a regular file; write the tar with copies, not links"
                        )
                    if suffix in samples.setdefault(key, {}):
                        raise DataError(f"{shard}: {info.name} is in it twice; give every sample its own name")
                    text = cast(IO[bytes], tar.extractfile(info)).read() if suffix in TEXTS else b""
                    samples[key][suffix] = Member(info.name, info.offset_data, info.size, text)
                end = tar.offset
        except tarfile.TarError as error:
            raise DataError(
                f"{shard} is damaged or no tar file: {error}; fetch it again, or unpack it if it is compressed"
            ) from None
        _check_end(shard, file, end)
    return samples


def _for_json(samples: Mapping[str, Members]) -> dict[str, Any]:
    """Return samples as JSON can hold them, in their order, each byte of a text as a character."""
    return {
        "samples": [
            (key, [(s, (m.name, m.offset, m.size, m.text.decode("latin-1"))) for s, m in members.items()])
            for key, members in samples.items()
        ]
    }


def _check_end(shard: Shard, file: IO[bytes], end: int) -> None:
    """Raise DataError unless only zeros follow; tarfile takes a cut or damaged header for the end of the tar."""
    file.seek(end)
    mark = file.read(tarfile.BLOCKSIZE)
    if len(mark) < tarfile.BLOCKSIZE or any(mark):
        raise DataError(f"{shard} is damaged: it is cut off or unreadable from byte {end} on; fetch it again")
    while rest := file.read(CHUNK):
        if any(rest):
            raise DataError(
                f"{shard} has data after its end: of tar files that are joined, only the first would be read; "
                "name them separately"
            )


def _split(name: str) -> tuple[str, str]:
    """Split a name into key and suffix as webdataset does: at the first dot after the last slash."""
    folder, slash, file = name.rpartition("/")
    key, dot, suffix = file.partition(".")
    return f"{folder}{slash}{key}", f"{dot}{suffix}".lower()


def _expand_ranges(pattern: str) -> Iterator[str]:
    """Yield the names that a pattern with ranges such as {000..127} stands for."""
    pieces = RANGE.split(pattern)
    spans = [range(int(low), int(high) + 1) for low, high in zip(pieces[1::3], pieces[2::3], strict=True)]
    if math.prod(map(len, spans)) > MAX_SHARDS:
        raise DataError(f"{pattern} names more than {MAX_SHARDS} tar files; name only files that exist")
    widths = [len(low) for low in pieces[1::3]]
    for numbers in product(*spans):
        written = [f"{n:0{width}d}" for n, width in zip(numbers, widths, strict=True)]
        yield "".join(a + b for a, b in zip(pieces[0::3], (*written, ""), strict=True))


def _expand_wildcard(path: Path) -> list[Path]:
    return sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
