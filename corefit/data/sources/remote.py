"""Raw data at addresses such as s3://bucket/data.jsonl: found, identified without being read, and read with fsspec.

Only this module imports fsspec. Credentials come from the environment, as each store's own library takes them.
"""

from __future__ import annotations

import os
import posixpath
import threading
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any, TypeGuard, cast

import attrs
from attrs import define, field

from corefit.errors import DataError, Unreachable
from corefit.system import public
from corefit.types import ArchiveMember, Url

Info = Mapping[str, Any]
"""What a store says about a file."""
CONTENT = ("md5Hash", "crc32c", "ETag", "etag", "blob_id", "oid", "content_hash")
"""Keys of what a store says that depend on a file's bytes; the first one that it has is used."""
TIMES = ("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "modified", "created")
"""Keys of the time of the last change, for stores without any of CONTENT."""
WEB = {"http", "https"}
"""Protocols of servers that list no folders: each file is asked for by itself."""
CREDENTIALS: Mapping[str, str] = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, and for another store than Amazon's "
    "AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
    "hf": "HF_TOKEN, or `hf auth login`",
}
"""Where each store's library looks for credentials."""
DENIED = {
    *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "TokenRetrievalError"),
    *("DefaultCredentialsError", "RefreshError", "UnauthorizedSSOTokenError", "GatedRepoError", "PermissionError"),
}
"""Names of errors that stores' libraries raise where credentials are missing or refused."""
NEAR = 1 << 23
"""Bytes of a block that is fetched where one of several neighbors is read."""
KEPT = 16
"""How many such blocks a process keeps in memory."""
BLOCK = 1 << 22
"""Bytes that are fetched at once where a file is read from its beginning on; what is skipped beyond is not fetched."""


def is_remote(place: Path | Url | None) -> TypeGuard[Url]:
    """Return whether a place is an address, and no path on this machine, which Python code may give as text, too."""
    return isinstance(place, str) and "://" in place


def check_address(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Raise ValueError for an address with a key or a password in it, which would be written into the run's files."""
    for place in cast(tuple[Any, ...], value) if isinstance(value, tuple) else (value,):
        if isinstance(place, str) and public.without_keys(place) != place:
            raise ValueError(
                f"{attribute.name!r} must be an address without keys and passwords, for it is written to the run's "
                f"files: {public.without_keys(place)}; put them into the environment "
                f"({CREDENTIALS.get(_scheme(Url(place)), 'as the library of its store takes them')})"
            )


def parent(place: Path | Url) -> Path | Url:
    """Return the folder that a file lies in."""
    return Url(place.partition("?")[0].rpartition("/")[0]) if is_remote(place) else cast(Path, place).parent


def located(folder: Path | Url, name: str) -> Path | Url:
    """Return the place of the file `name`, which is relative to `folder`, or an address itself."""
    if "://" in name:
        return Url(name)
    if not is_remote(folder):
        return cast(Path, folder) / name
    scheme, _, path = folder.partition("://")
    return Url(f"{scheme}://{posixpath.normpath(f'{path}/{name}')}")


def shown(place: Path | Url) -> str:
    """Return a place as messages name it: an address without what follows `?`, and without a password."""
    return public.without_keys(place.partition("?")[0]) if is_remote(place) else str(place)


@define(eq=False)
class Store:
    """What stores say about files. A folder is listed once, when one of its files is first asked for.

    Make a new one each time that a source is read, for files may have changed since.
    """

    folders: dict[str, Mapping[str, Info] | None] = field(factory=dict[str, "Mapping[str, Info] | None"])
    """Path of a folder -> name of a file in it -> what the store says; None where it may not be listed."""

    def version(self, url: Url) -> str:
        """Return what identifies a file's bytes, or "" where the store says nothing; DataError if there is no file."""
        return _version(url, self._info(url))

    def member(self, url: Url) -> ArchiveMember:
        """Return the medium at `url`, which is read when it is decoded."""
        return ArchiveMember(shown(url), lambda: read(url), version=lambda: self.version(url))

    def medium(self, place: Path | Url) -> Path | ArchiveMember:
        """Return the medium at a place, a file of this machine as its path."""
        return self.member(place) if is_remote(place) else cast(Path, place)

    def _info(self, url: Url) -> Info:
        with explained(url):
            fs, path = _filesystem(url)
            if _scheme(url) in WEB:
                return fs.info(path)
            folder, _, name = path.rpartition("/")
            listed = self._listed(fs, folder)
            if listed is None:
                return fs.info(path)
            if name not in listed:
                raise FileNotFoundError(path)
            return listed[name]

    def _listed(self, fs: Any, folder: str) -> Mapping[str, Info] | None:
        if folder not in self.folders:
            try:
                found = fs.ls(folder, detail=True, refresh=True)
                self.folders[folder] = {info["name"].rstrip("/").rpartition("/")[2]: info for info in found}
            except PermissionError:  # files may be read, but not listed
                self.folders[folder] = None
        return self.folders[folder]


def read(url: Url, start: int | None = None, end: int | None = None) -> bytes:
    """Return the bytes of a file, or those from `start` to `end`."""
    if start is not None and start == end:  # a range that no store knows how to give
        return b""
    with explained(url):
        fs, path = _filesystem(url)
        return fs.cat_file(path, start=start, end=end)


@define(eq=False)
class Blocks:
    """Blocks of files that are kept in memory: of neighbors in an archive, many come with one request."""

    kept: dict[tuple[Url, str, int], Future[bytes]] = field(factory=dict[tuple[Url, str, int], "Future[bytes]"])
    _lock: threading.Lock = field(init=False, factory=threading.Lock)

    def read(self, url: Url, version: str, start: int, end: int) -> bytes:
        """Return the bytes from `start` to `end` of a file; several threads may ask."""
        if end - start > NEAR:
            return read(url, start, end)
        first = start // NEAR
        near = b"".join(self._block(url, version, number) for number in range(first, (end - 1) // NEAR + 1))
        return near[start - first * NEAR : end - first * NEAR]

    def _block(self, url: Url, version: str, number: int) -> bytes:
        """Return a block; of several threads that ask for it, the first fetches it."""
        key = (url, version, number)
        with self._lock:
            known = self.kept.pop(key, None)
            block = self.kept[key] = known or Future()  # the last one in is the last one to go
            if len(self.kept) > KEPT:
                del self.kept[next(iter(self.kept))]
        if known is None:
            try:
                block.set_result(read(url, number * NEAR, (number + 1) * NEAR))
            except BaseException as error:
                self.kept.pop(key, None)
                block.set_exception(error)
        return block.result()


BLOCKS = Blocks()
"""Those of this process."""


@contextmanager
def opened(place: Path | Url) -> Generator[IO[bytes]]:
    """Open a file for reading; DataError where a file of a store is missing or cannot be read."""
    if not is_remote(place):
        with cast(Path, place).open("rb") as file:
            yield file
        return
    with explained(place):
        fs, path = _filesystem(place)
        with fs.open(path, "rb", block_size=BLOCK, cache_type="readahead") as file:
            yield file


def lines(place: Path | Url) -> Iterator[bytes]:
    """Yield the lines of a file."""
    with opened(place) as file:
        yield from file


def found(pattern: Url, suffix: str = "") -> list[Url]:
    """Return the addresses that a pattern with * stands for, sorted; with `suffix`, also those of files in a folder.

    Hidden files, whose names or folders start with a dot or an underscore, are left out of a folder.
    """
    with explained(pattern):
        fs, path = _filesystem(pattern)
        if "*" in pattern:
            paths = fs.glob(path)
        elif suffix and not path.endswith(suffix) and fs.isdir(path):
            inside = (each for each in fs.find(path) if each.endswith(suffix))
            paths = [each for each in inside if not hidden(each.removeprefix(path).strip("/"))]
        else:
            return [pattern]
        scheme = pattern.partition("://")[0]
        return sorted(Url(f"{scheme}://{each.lstrip('/')}") for each in paths)


def hidden(name: str) -> bool:
    """Return whether a file, named relative to a folder, is hidden there, as unfinished files are."""
    return any(part.startswith((".", "_")) for part in name.split("/"))


@contextmanager
def explained(url: Url) -> Generator[None]:
    """Turn errors of a store into DataErrors that name the address: Unreachable for all but a missing file."""
    try:
        yield
    except DataError:
        raise
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise DataError(f"{shown(url)}: no such file{_said(error, url)}") from error
    except Exception as error:  # each store's library has exceptions of its own
        if _is_denied(error):
            where = CREDENTIALS.get(_scheme(url), "as the library of its store takes them")
            raise Unreachable(
                f"{shown(url)} may not be read with the credentials of this environment ({_named(error)}); set others "
                f"({where})"
            ) from error
        raise Unreachable(
            f"{shown(url)} cannot be read: {_named(error)}. Check the address and the network; the same command goes "
            "on where it was"
        ) from error


def _said(error: OSError, url: Url) -> str:
    """Return what a store says beyond the name of the file, such as that there is no such bucket."""
    text = public.without_keys(str(error))
    _, path = _filesystem(url)
    return f" ({text})" if text and text.strip("/'\" ") != path.strip("/") and " " in text else ""


def _named(error: Exception) -> str:
    return public.without_keys(f"{type(error).__name__}: {error}")


def _is_denied(error: BaseException) -> bool:
    """Return whether a store refuses the credentials, or there are none."""
    response: Any = getattr(error, "response", None)
    status = getattr(error, "status", None) or getattr(error, "code", None) or getattr(response, "status_code", None)
    named = any(kind.__name__ in DENIED for kind in type(error).__mro__)
    return named or status in (401, 403) or (isinstance(error.__cause__, Exception) and _is_denied(error.__cause__))


def _version(url: Url, info: Info) -> str:
    size = info.get("size")
    if content := next((f"{key} {info[key]}" for key in CONTENT if info.get(key)), ""):
        return f"{content} {size}"
    time = next((info[key] for key in TIMES if info.get(key)), None)
    # the same bytes elsewhere have another time: the address is part of what identifies them
    return "" if time is None else f"{shown(url)} {time.timestamp() if hasattr(time, 'timestamp') else time} {size}"


def _scheme(url: Url) -> str:
    return {"s3a": "s3", "gcs": "gs"}.get(scheme := url.partition("://")[0].lower(), scheme)


def _filesystem(url: Url) -> tuple[Any, str]:
    """Return fsspec's file system of an address, and the path in it; DataError where its package is missing."""
    import fsspec

    scheme = url.partition("://")[0].lower()
    try:
        kind: Any = fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise DataError(
            f"{shown(url)}: files at {scheme}:// are read with a package that is not installed ({error}): "
            "pip install 'corefit[remote]'"
        ) from None
    except ValueError:
        raise DataError(
            f"{shown(url)}: {scheme}:// is no protocol that fsspec knows; s3://, gs:// and hf:// are, and https://"
        ) from None
    options = kind._get_kwargs_from_urls(url)
    return _made(scheme, tuple(sorted(options.items())), os.getpid()), kind._strip_protocol(url)


@cache
def _made(scheme: str, options: tuple[tuple[str, Any], ...], _: int) -> Any:
    """Make the file system of a process once: fsspec would make another one, with its connections, in each thread."""
    import fsspec

    more: dict[str, Any] = {}
    # the variable that mosaicml-streaming reads for [data] encoded; the libraries of Amazon have another one
    if scheme in ("s3", "s3a") and (address := os.environ.get("S3_ENDPOINT_URL")):
        more = {} if os.environ.get("AWS_ENDPOINT_URL") else {"endpoint_url": address}
    return fsspec.filesystem(scheme, **dict(options), **more)
