"""The only writer of training data: every example is encoded once, into MDS shards that `data` reads.

A cache is a folder named by the hash of everything that determines it. It is written elsewhere and renamed
when complete, so half of one is never read, and a change of anything makes another.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define, field

from corefit import mds
from corefit.data import COND, DONE, NULL, X0, Data, Dataset, Manifest, sha256
from corefit.encode import Encoder
from corefit.errors import DataError
from corefit.ranks import alive
from corefit.sources import listed

if TYPE_CHECKING:
    from corefit.types import Backbone, Example

FORMAT = 2
"""Part of every key: raise it when the same input gives other bytes."""
SKIPPED = "skipped.json"
HASHES = "media.json"
SETTLED = 2_000_000_000
"""Nanoseconds after which a file's time stamps tell it from any later version."""
DAY = 86400
TEMPORARY = re.compile(r"[0-9a-f]{16}\.tmp-(?P<host>.+)-(?P<pid>\d+)-[^-]+")

Progress = Callable[[int, int], None]


def check(data: Data, *, media: bool) -> int | None:
    """Examples; None where only a network knows. DataError for what is wrong and shows without opening a picture."""
    if data.encoded is None:
        return _survey(data, media, lambda _: "")[0]
    if _is_remote(data.encoded):
        return None
    manifest = Manifest.read(Path(data.encoded))
    _refuse_without(manifest, data.encoded, media)
    return manifest.count


def key(data: Data, backbone: Backbone, root: Path, *, media: bool) -> str:
    """Hash of all that determines the cache: examples, media bytes, size, encoders, what is encoded."""
    return _keyed(data, backbone, media, _Hashes(root / HASHES))[1]


def opened(data: Data, backbone: Backbone, root: Path, *, media: bool) -> Dataset:
    """What `data.encoded` names, where it is; copies of a remote one are kept under `root`.

    After `place` or `load` of the backbone. DataError: it is missing or damaged, was made for other encoders or
    another size, or has no media where they are asked for.
    """
    place = str(data.encoded)
    remote = place.rstrip("/") if _is_remote(place) else None
    folder = root / f"remote-{hashlib.sha256(remote.encode()).hexdigest()[:16]}" if remote else Path(place)
    dataset = Dataset.open(folder, remote)
    _refuse_without(dataset.manifest, place, media)
    here = _fits(data, backbone)
    if wrong := [name for name in sorted(here) if dataset.manifest.fits.get(name) != here[name]]:
        raise DataError(
            f"{place} was encoded with another {', '.join(wrong)} than this pipeline has; encode its data again "
            "([data] source), or take the backbone and size that it was made with"
        )
    return dataset


def _is_remote(place: str) -> bool:
    return "://" in place


def _refuse_without(manifest: Manifest, place: str, media: bool) -> None:
    if media and not manifest.media:
        raise DataError(f"{place} holds prompts alone, and a stage needs media")


def exists(data: Data, backbone: Backbone, root: Path, *, media: bool) -> bool:
    """Whether `prepare` would return at once."""
    digest = key(data, backbone, root, media=media)
    return _complete(_folder(root, digest), digest)


def prepare(
    data: Data, backbone: Backbone, root: Path, *, media: bool, progress: Progress = lambda done, total: None
) -> Path:
    """The folder under `root` with `data` encoded: an existing one, or one that is written now.

    media=False encodes prompts alone. Only text encoders and VAE are used, and released. progress gets
    (examples done, all). DataError: media missing or unreadable beyond `skip`, values that are not finite.
    """
    hashes = _Hashes(root / HASHES)
    total, digest = _keyed(data, backbone, media, hashes)
    folder = _folder(root, digest)
    if not _complete(folder, digest):
        with _temporary(root, folder.name) as temporary:
            encoder = Encoder(data, backbone, media, tuple(backbone.latent_shape(data.size)))
            _encode(encoder, temporary, digest, total, progress)
            _publish(temporary, folder, digest)
    hashes.save()
    _within_budget(data, folder)
    return folder


def _folder(root: Path, digest: str) -> Path:
    return root / digest[:16]


def _complete(folder: Path, digest: str) -> bool:
    if not (folder / DONE).exists():
        return False
    if Manifest.read(folder).key != digest:
        raise mds.damaged(folder / DONE, "its key is not the folder's")
    return True


def _within_budget(data: Data, folder: Path) -> None:
    """A cache that was written under a larger budget is no way around a smaller one."""
    if (manifest := Manifest.read(folder)).skipped > data.skip:
        total = manifest.skipped + manifest.count
        raise DataError(_too_many(json.loads((folder / SKIPPED).read_bytes()), total, data.skip))


# what determines a cache


def _keyed(data: Data, backbone: Backbone, media: bool, hashes: _Hashes) -> tuple[int, str]:
    total, examples = _survey(data, media, hashes.of)
    parts = {**_fits(data, backbone), "media": media, "examples": examples}
    return total, hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _fits(data: Data, backbone: Backbone) -> dict[str, Any]:
    """What of the key must be equal for whoever reads the cache."""
    return {"format": FORMAT, "size": list(data.size), **backbone.encoding_key()}


def _survey(data: Data, media: bool, digest: Callable[[Any], str]) -> tuple[int, str]:
    """Number and hash of all examples; media are ignored unless asked for."""
    total, number = hashlib.sha256(), 0
    bare: list[str] = []
    missing: list[str] = []
    for number, example in enumerate(data.raw.examples(), 1):
        if media and example.media is None:
            bare.append(f"example {number}: {example.prompt!r}")
        if media and isinstance(example.media, Path) and not example.media.is_file():
            missing.append(f"{example.media}: no such file")
        wanted = media and not bare and len(missing) <= data.skip
        total.update(_line(number, example, digest(example.media) if wanted else ""))
    if bare:
        raise DataError(f"{len(bare)} of {number} examples have no media, and a stage needs them:\n{listed(bare)}")
    if number == 0:
        raise DataError(f"the source {type(data.raw).__name__} has no examples")
    _readable(missing, number, data.skip)
    return number, total.hexdigest()


def _line(number: int, example: Example, content: str) -> bytes:
    try:
        return json.dumps([example.prompt, dict(example.meta), content], sort_keys=True).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise DataError(f"the meta of example {number} ({example.prompt!r}) is not JSON: {error}") from None


def _readable(failed: Sequence[str], total: int, skip: int) -> None:
    if len(failed) > skip:
        raise DataError(_too_many(failed, total, skip))
    if len(failed) == total:
        raise DataError(f"none of the {total} media can be read:\n{listed(failed)}")


def _too_many(failed: Sequence[str], total: int, skip: int) -> str:
    return (
        f"{len(failed)} of {total} media are missing or unreadable, and {skip} may be skipped:\n{listed(failed)}\n"
        f"repair or remove them, or set skip = {len(failed)} under [data] to leave them out"
    )


@define
class _Hashes:
    """sha256 of media; those of files are remembered in `file`, by size and time stamps."""

    file: Path
    known: dict[str, list[Any]] = field(init=False, factory=dict[str, list[Any]])
    changed: bool = field(init=False, default=False)

    def __attrs_post_init__(self) -> None:
        with suppress(OSError, ValueError):  # without it, everything is read once more
            self.known = json.loads(self.file.read_bytes())

    def of(self, media: Path | Any) -> str:
        if not isinstance(media, Path):
            return hashlib.sha256(f"{media.dtype} {media.shape} ".encode() + media.tobytes()).hexdigest()
        if not media.is_file():
            return "missing"
        stat = media.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        *before, digest = self.known.get(str(media), [""])
        if before == stamp:
            return digest
        digest = sha256(media)
        if time.time_ns() - max(stamp[1:]) > SETTLED:
            self.known[str(media)], self.changed = [*stamp, digest], True
        return digest

    def save(self) -> None:
        if not self.changed:
            return
        for left in self.file.parent.glob(f"{self.file.stem}.[0-9]*"):
            if not alive(int(left.suffix[1:])):
                left.unlink(missing_ok=True)
        temporary = self.file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(self.known))
        temporary.replace(self.file)


# files


def _encode(encoder: Encoder, folder: Path, digest: str, total: int, progress: Progress) -> None:
    """Fill `folder`, its manifest last."""
    import torch
    from safetensors.torch import save_file

    try:
        with torch.no_grad():
            _write_rows(encoder, folder, encoder.rows(lambda done: progress(done, total)))
            save_file(encoder.null(), folder / NULL)
    finally:
        encoder.backbone.release()
    if encoder.seen != total:
        raise DataError(f"the source gave {total} examples, then {encoder.seen}: it changed while being encoded")
    (folder / SKIPPED).write_text(json.dumps(encoder.failed, indent=1))
    _manifest(encoder, folder, digest).write(folder)


def _write_rows(encoder: Encoder, folder: Path, rows: Iterator[mds.Row]) -> None:
    first = next(rows, None)
    if first is not None:
        with mds.writing(folder, _columns(first, encoder.shape)) as shards:
            for row in chain([first], rows):
                shards.append(row)
    _readable(encoder.failed, encoder.seen, encoder.data.skip)


def _columns(row: mds.Row, shape: Sequence[int]) -> dict[str, str]:
    latents = f"ndarray:float32:{','.join(map(str, shape))}"
    known = {"prompt": "str", "meta": "json", X0: latents}
    return {name: "bytes" if name.startswith(COND) else known[name] for name in row}


def _manifest(encoder: Encoder, folder: Path, digest: str) -> Manifest:
    return Manifest(
        key=digest,
        fits=_fits(encoder.data, encoder.backbone),
        count=encoder.count,
        media=encoder.media,
        shape=encoder.shape,
        cond=encoder.cond,
        skipped=len(encoder.failed),
        enlarged=encoder.enlarged,
        files={name: sha256(folder / name) for name in (mds.INDEX, NULL, SKIPPED)},
    )


@contextmanager
def _temporary(root: Path, name: str) -> Generator[Path, None, None]:
    """A new folder in `root`, gone afterwards unless renamed; those of dead processes are removed first."""
    root.mkdir(parents=True, exist_ok=True)
    for stale in filter(_stale, root.iterdir()):
        shutil.rmtree(stale, ignore_errors=True)
    folder = root / f"{name}.tmp-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # nothing else in it: a run that could not start leaves nothing
            root.rmdir()


def _stale(folder: Path) -> bool:
    """Left by a process that is dead or had this one's number, or by another machine and a day old."""
    match = TEMPORARY.fullmatch(folder.name)
    if match is None:
        return False
    if match["host"] != socket.gethostname():
        return time.time() - folder.stat().st_mtime > DAY
    return int(match["pid"]) == os.getpid() or not alive(int(match["pid"]))


def _publish(temporary: Path, folder: Path, digest: str) -> None:
    """Rename what is on the disk; where another process was faster, its work is as good."""
    for path in [*temporary.iterdir(), temporary]:
        _sync(path)
    if folder.exists() and not _complete(folder, digest):
        shutil.rmtree(folder)
    try:
        temporary.rename(folder)
    except OSError:
        if not _complete(folder, digest):
            raise
    _sync(folder.parent)


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
