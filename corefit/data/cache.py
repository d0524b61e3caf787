"""The only writer of training data: every example is encoded once, into MDS shards that `data` reads.

A cache is a folder named by the hash of everything that determines it. It is written in parts, each whole or not
at all, under another name, and renamed when complete: half a cache is never read, and finished parts are never made
again. What a part holds depends on its examples alone, not on how many processes there are or were.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
from attrs import define, field, frozen

from corefit.data import buckets, mds
from corefit.data.dataset import COND, DONE, NULL, ROWS, X0, Dataset, Manifest, Spec, part_name
from corefit.data.encode import Encoder, chunks
from corefit.data.scan import Hashes, check_readable, survey, too_many
from corefit.data.settings import Data
from corefit.errors import DataError
from corefit.system import files, memory
from corefit.system.files import sha256
from corefit.system.ranks import SINGLE, Ranks

if TYPE_CHECKING:
    from corefit.system.ranks import Ranks
    from corefit.types import Backbone, Example, Reward, Weighted

FORMAT = 4
"""Part of every key: raise it when the same input gives other bytes."""
PART = 512
"""Examples of a part: what a kill costs at most, a process."""
SKIPPED = "skipped.json"
ACCOUNT = "part.json"
UNDIGESTED = {"seen", "count", "failed", "enlarged", "cond"}
"""Keys of part.json as version 0.1 wrote it, without a digest."""
HASHES = "media.json"
ABANDONED = 7 * 86400
"""Seconds after which unfinished parts that nobody goes on with are removed."""
UNFINISHED = re.compile(r"[0-9a-f]{16}\.parts")

Progress = Callable[[int, int], None]
T = TypeVar("T")


def check(data: Data, *, media: bool) -> int | None:
    """Examples; None where only a network knows. DataError for what is wrong and shows without opening a picture."""
    if data.encoded is None:
        return survey(data, media, lambda _: "")[0]
    if _is_remote(data.encoded):
        return None
    manifest = Manifest.read(Path(data.encoded))
    _refuse_without(manifest, data.encoded, media)
    return manifest.count


def key(data: Data, backbone: Backbone, root: Path, *, media: bool) -> str:
    """Hash of all that determines the cache: examples, media bytes, sizes, encoders, scores, what is encoded."""
    return _keyed(data, backbone, media, Hashes(root / HASHES))[1]


def opened(data: Data, backbone: Backbone, root: Path, *, media: bool) -> Dataset:
    """What `data.encoded` names, where it is; copies of a remote one are kept under `root`.

    After `place` or `load` of the backbone. DataError: it is missing or damaged, was made for other encoders or
    another size, or has no media where they are asked for.
    """
    place = str(data.encoded)
    remote = place.rstrip("/") if _is_remote(place) else None
    folder = root / f"remote-{hashlib.sha256(remote.encode()).hexdigest()[:16]}" if remote else Path(place)
    dataset = Dataset.open(folder, remote, data.condition)
    _refuse_without(dataset.manifest, place, media)
    here = _fits(data, backbone, dataset.has_media)
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
    data: Data,
    backbone: Backbone,
    root: Path,
    *,
    media: bool,
    progress: Progress = lambda done, total: None,
    ranks: Ranks = SINGLE,
) -> Path:
    """The folder under `root` with `data` encoded: an existing one, or one that is written now.

    media=False encodes prompts alone. Only text encoders and VAE are used, and released. progress gets
    (examples done, all) of this process. Several ranks share the parts; a killed one's are kept.
    DataError: media missing or unreadable beyond `skip`, values that are not finite.
    """
    hashes = Hashes(root / HASHES)
    total, digest = ranks.from_main(lambda: _keyed(data, backbone, media, hashes))
    folder = _folder(root, digest)
    work = CacheBuilder(data, backbone, media, digest, total, folder)
    if not ranks.from_main(lambda: _complete(folder, digest)):
        with _alone(root, work.parts, ranks.main):
            if not ranks.from_main(lambda: _complete(folder, digest)):  # another run may have been at it until now
                _make(work, progress, ranks)
    if ranks.main:
        files.remove_stale_locks(root)
        hashes.save()
        _within_budget(data, folder)
    ranks.barrier()
    return folder


def _make(work: CacheBuilder, progress: Progress, ranks: Ranks) -> None:
    size = work.data.encode_batch
    helps = [f"encode_batch = {size // 2} (now {size})"] if size > 1 else []
    try:
        with memory.explain_exhaustion("encoding", helps, "Parts that are encoded are kept; the same command goes on"):
            work.encode(progress, ranks.rank, ranks.world)
        ranks.barrier()
        if ranks.main:
            work.publish()
    finally:
        work.backbone.release()


def _folder(root: Path, digest: str) -> Path:
    return root / digest[:16]


def _complete(folder: Path, digest: str) -> bool:
    if not (folder / DONE).exists():
        return False
    if Manifest.read(folder, remade=True).key != digest:
        raise mds.damaged(folder / DONE, "its key is not the folder's", remade=True)
    return True


def _within_budget(data: Data, folder: Path) -> None:
    """A cache that was written under a larger budget is no way around a smaller one."""
    if (manifest := Manifest.read(folder, remade=True)).skipped > data.skip:
        total = manifest.skipped + manifest.count
        raise DataError(too_many(json.loads((folder / SKIPPED).read_bytes()), total, data.skip))


# what determines a cache


def _keyed(data: Data, backbone: Backbone, media: bool, hashes: Hashes) -> tuple[int, str]:
    total, examples = survey(data, media, hashes.of)
    scores = {entry.name: _scorer(entry) for entry in data.score} if media else {}
    parts = {**_fits(data, backbone, media), "media": media, "examples": examples, "scores": scores}
    return total, hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _fits(data: Data, backbone: Backbone, media: bool) -> dict[str, Any]:
    """What of the key must be equal for whoever reads the cache."""
    fps = {"fps": data.fps} if data.fps else {}
    size = [list(bucket) for bucket in _sizes(data, backbone, media)]
    return {"format": FORMAT, "size": size, **fps, **backbone.encoding_key()}


def _sizes(data: Data, backbone: Backbone, media: bool) -> Sequence[buckets.Size]:
    return buckets.sizes(data.size, data.aspects if media else (), backbone)


def _scorer(entry: Weighted[Reward]) -> Mapping[str, str]:
    """What determines a reward's scores: its keys, and the source it is written in."""
    kind = type(entry.value)
    keys = {f.name: str(getattr(entry.value, f.name)) for f in attrs.fields(kind) if f.init}
    return {**keys, "code": sha256(Path(inspect.getfile(kind)))}


# parts


@define(eq=False)
class CacheBuilder:
    """A cache in the making: its parts lie in `parts`, under another name than the finished folder's."""

    data: Data
    backbone: Backbone
    media: bool
    digest: str
    total: int
    folder: Path
    encoder: Encoder = field(init=False)

    def __attrs_post_init__(self) -> None:
        sizes = _sizes(self.data, self.backbone, self.media)
        shapes = [tuple(self.backbone.latent_shape(size)) for size in sizes]
        self.encoder = Encoder(self.data, self.backbone, self.media, sizes, shapes)

    @property
    def parts(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.parts")

    def encode(self, progress: Progress, rank: int, world: int) -> None:
        """Every world-th part, from the rank-th on, that is not there already; past the budget none is finished."""
        import torch

        done, mine = 0, range(rank, -(-self.total // PART), world)
        share = sum(min(PART, self.total - number * PART) for number in mine)
        for number, examples in enumerate(chunks(self.data.raw.examples(), PART)):
            if number in mine:
                with torch.no_grad():
                    self._part(number, examples, lambda n, before=done: progress(before + n, share))
                done += len(examples)
                progress(done, share)
        check_readable(self.encoder.failed, self.total, self.data.skip)

    def _part(self, number: int, examples: Sequence[Example], progress: Callable[[int], None]) -> None:
        final, temporary = self.parts / part_name(number), self.parts / f".{part_name(number)}"
        if final.exists() and (account := Account.found(final)):
            self.encoder.failed += account.failed
            return
        shutil.rmtree(final, ignore_errors=True)  # its small files are damaged: it is encoded again, and it alone
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        encoder, failed, enlarged = self.encoder, len(self.encoder.failed), self.encoder.enlarged
        encoder.texts.clear()  # what is encoded together changes the last bits: a part must not depend on others
        try:
            count = _write_rows(encoder, temporary, _counted(encoder.rows(examples), progress))
            hashes = {file.name: sha256(file) for file in temporary.iterdir() if file.name in (ROWS, mds.INDEX)}
            enlarged = encoder.enlarged - enlarged
            account = Account(len(examples), count, encoder.failed[failed:], enlarged, encoder.cond, hashes)
            files.write_json(temporary / ACCOUNT, attrs.asdict(account))
            if len(encoder.failed) <= self.data.skip:
                files.publish(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def publish(self) -> None:
        """Put the parts together, and give them their name."""
        accounts = list(self._accounts())
        if (seen := sum(account.seen for account in accounts)) != self.total:
            shutil.rmtree(self.parts)
            raise DataError(f"the source gave {self.total} examples, then {seen}: it changed while being encoded")
        failed = [reason for account in accounts for reason in account.failed]
        check_readable(failed, self.total, self.data.skip)
        self._write_small(accounts, failed)
        if self.folder.exists():
            shutil.rmtree(self.folder)  # without its manifest, which was asked for before
        files.publish(self.parts, self.folder)

    def _accounts(self) -> Iterator[Account]:
        number = 0
        while (folder := self.parts / part_name(number)).exists():
            if (account := Account.found(folder)) is None:
                raise mds.damaged(folder / ACCOUNT, "it was whole when its part was encoded", remade=True)
            yield account
            number += 1

    def _write_small(self, accounts: Sequence[Account], failed: Sequence[str]) -> None:
        """What is of all parts: null, index, skipped.json, the manifest last."""
        from safetensors.torch import save

        encoder, names = self.encoder, [part_name(number) for number in range(len(accounts))]
        encoder.cond = next(dict(account.cond) for account in accounts if account.cond)
        (self.parts / NULL).write_bytes(save(encoder.null()))  # save_file would write for the owner alone
        mds.join(self.parts, [name for name, account in zip(names, accounts, strict=True) if account.count])
        (self.parts / SKIPPED).write_text(json.dumps(failed, indent=1))
        small = [mds.INDEX, NULL, SKIPPED, *(f"{name}/{ROWS}" for name in names)]
        Manifest(
            key=self.digest,
            fits=_fits(self.data, self.backbone, self.media),
            count=sum(account.count for account in accounts),
            parts=len(accounts),
            media=self.media,
            sizes=tuple(encoder.sizes),
            shapes=tuple(encoder.shapes),
            cond=encoder.cond,
            skipped=len(failed),
            enlarged=sum(account.enlarged for account in accounts),
            files={name: sha256(self.parts / name) for name in small},
        ).write(self.parts)


@frozen
class Account:
    """part.json: examples of a part, those of them that are in it, why others are not, what is in it, and its hashes.

    files  sha256 of the small files beside it, by name; none in what version 0.1 wrote
    """

    seen: int
    count: int
    failed: Sequence[str]
    enlarged: int
    cond: Mapping[str, Spec]
    files: Mapping[str, str] = field(factory=dict[str, str])

    @staticmethod
    def found(folder: Path) -> Account | None:
        """Return what the part in `folder` holds; None where one of its small files is missing or damaged."""
        try:
            raw = files.read_json(folder / ACCOUNT, lambda content: set(content) == UNDIGESTED)
        except (FileNotFoundError, files.Damaged):
            return None
        cond = {name: Spec(s["dtype"], tuple(s["shape"])) for name, s in raw["cond"].items()}
        account = attrs.evolve(Account(**raw), cond=cond)
        there = {file.name: sha256(file) for file in folder.iterdir() if file.name in account.files}
        return account if there == account.files else None


def _counted(rows: Iterator[mds.Row], progress: Callable[[int], None]) -> Iterator[mds.Row]:
    for number, row in enumerate(rows):
        progress(number)
        yield row


def _write_rows(encoder: Encoder, folder: Path, rows: Iterator[mds.Row]) -> int:
    """How many there were. Bucket and metadata go beside the shards too, where all can be read at once."""
    first, lines = next(rows, None), list[str]()
    if first is not None:
        with mds.writing(folder, _columns(first)) as shards:
            for row in chain([first], rows):
                shards.append({name: value for name, value in row.items() if name != "bucket"})
                lines.append(json.dumps({"bucket": row["bucket"], "meta": row["meta"]}) + "\n")
    (folder / ROWS).write_text("".join(lines))
    return len(lines)


def _columns(row: mds.Row) -> dict[str, str]:
    known = {"prompts": "json", "meta": "json", "view": "json", X0: "ndarray:float32"}
    return {name: "bytes" if name.startswith(COND) else known[name] for name in row if name != "bucket"}


# files


@contextmanager
def _alone(root: Path, parts: Path, main: bool) -> Generator[None]:
    """One run at a time makes a cache; the lock goes with the process, however it ends."""
    if not main:
        yield
        return
    root.mkdir(parents=True, exist_ok=True)
    for stale in filter(_abandoned, root.iterdir()):
        if stale != parts:
            shutil.rmtree(stale, ignore_errors=True)
    try:
        with files.temporary_lock(parts.with_suffix(".lock")):
            yield
    finally:
        with suppress(OSError):  # nothing in it: a run that could not start leaves nothing
            parts.rmdir()
        with suppress(OSError):
            root.rmdir()


def _abandoned(folder: Path) -> bool:
    return UNFINISHED.fullmatch(folder.name) is not None and time.time() - folder.stat().st_mtime > ABANDONED
