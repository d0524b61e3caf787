"""Write caches: encode every example of a source once, into MDS shards that `dataset` reads.

A cache is a folder named by the hash of everything that determines its content. It is written in partitions, folders
of PARTITION examples each. A partition is written under a temporary name and renamed when complete, and so is the
whole cache: a half-written one is never read, and complete partitions are not encoded again after a kill. What a
partition holds depends on its examples alone, not on the number of processes.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
from attrs import define, field

from corefit.data import buckets, mds, partition, texts
from corefit.data.coding import Coder, smaller
from corefit.data.dataset import DONE, NULL, ROWS, Dataset, Manifest, partition_name
from corefit.data.encode import Encoder, chunks
from corefit.data.partition import Record
from corefit.data.scan import MediaHashes, check_readable, find, scan, too_many_unreadable
from corefit.data.settings import Data
from corefit.errors import DataError
from corefit.system import cuda, files, memory
from corefit.system.files import portable, sha256
from corefit.system.ranks import SINGLE, Ranks
from corefit.types import ROUNDING, KeyedReward

if TYPE_CHECKING:
    from corefit.system.ranks import Ranks
    from corefit.types import Backbone, Example, Reward, Weighted

FORMAT = 4
"""The version of the cache format, hashed into every key: raise it when the same input gives other bytes."""
PARTITION = 512
"""Examples in a partition: the most that a process has to encode again after a kill."""
SKIPPED = "skipped.json"
HASHES = "media.json"
ABANDONED = 7 * 86400
"""Seconds after which an unfinished cache that no run continues is removed."""
UNFINISHED_NAME = re.compile(r"[0-9a-f]{16}\.parts")

Progress = Callable[[int, int], None]
T = TypeVar("T")


def check(data: Data, *, media: bool, extra: Sequence[str] = ()) -> int | None:
    """Return the number of examples, or None if only the network could tell.

    DataError for everything wrong with the data that shows without decoding media.
    """
    if data.encoded is None:
        return scan(data, media, find, extra)[0]
    if _is_remote(data.encoded):
        return None
    manifest = Manifest.read(Path(data.encoded))
    _require_media(manifest, data.encoded, media, extra)
    return manifest.count


def key(data: Data, backbone: Backbone, root: Path, *, media: bool, extra: Sequence[str] = ()) -> str:
    """Return the hash of everything that determines the cache: examples, media bytes, sizes, encoders and scores."""
    return _count_and_key(data, backbone, media, extra, MediaHashes(root / HASHES))[1]


def open_encoded(data: Data, backbone: Backbone, root: Path, *, media: bool, extra: Sequence[str] = ()) -> Dataset:
    """Open the cache that `data.encoded` names; copies of a remote one are kept under `root`.

    Call it after the backbone's `place` or `load`. DataError if the cache is missing or damaged, was encoded with
    other encoders or another size, or lacks media that `media` and `extra` require.
    """
    location = str(data.encoded)
    remote = location.rstrip("/") if _is_remote(location) else None
    folder = root / f"remote-{hashlib.sha256(remote.encode()).hexdigest()[:16]}" if remote else Path(location)
    dataset = Dataset.open(folder, remote, data.filter)
    _require_media(dataset.manifest, location, media, extra)
    current = _compatibility(data, backbone, dataset.has_media)
    if wrong := [name for name in sorted(current) if dataset.manifest.fits.get(name) != current[name]]:
        raise DataError(
            f"{location} was encoded with another {', '.join(wrong)} than this pipeline has; encode its data again "
            "([data] source), or set the backbone and size that it was encoded with"
        )
    return dataset


def _is_remote(location: str) -> bool:
    return "://" in location


def _require_media(manifest: Manifest, location: str, media: bool, extra: Sequence[str]) -> None:
    if media and not manifest.media:
        raise DataError(f"{location} has prompts without media, and a stage needs media")
    if missing := [name for name in extra if name not in manifest.extra]:
        raise DataError(
            f"{location} was encoded without {missing[0]!r}, which the objective of a stage reads "
            f"(media:{missing[0]}); encode its data again, in a pipeline with this objective ([data] source)"
        )


def exists(data: Data, backbone: Backbone, root: Path, *, media: bool, extra: Sequence[str] = ()) -> bool:
    """Return whether the cache is complete, so that `prepare` would encode nothing."""
    digest = key(data, backbone, root, media=media, extra=extra)
    return _complete(_folder(root, digest), digest)


def prepare(
    data: Data,
    backbone: Backbone,
    root: Path,
    *,
    media: bool,
    extra: Sequence[str] = (),
    progress: Progress = lambda done, total: None,
    ranks: Ranks = SINGLE,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Return the folder under `root` with the cache of `data`, and encode the data first if there is none.

    media=False encodes prompts only; `extra` names the further media to encode. Text encoders and VAE are used and then
    released. `progress` is called with two numbers: how many examples this process has encoded, and how many it has to
    encode; `say` with what there is to say besides. The ranks divide the partitions among them, and those that a killed
    process completed are kept. DataError for more missing or unreadable media than `skip`, and for values that are not
    finite.
    """
    hashes = MediaHashes(root / HASHES)
    total, digest = ranks.from_main(lambda: _count_and_key(data, backbone, media, extra, hashes))
    folder = _folder(root, digest)
    builder = CacheBuilder(data, backbone, media, extra, digest, total, folder, say)
    if not ranks.from_main(lambda: _complete(folder, digest)):
        with _exclusive(root, builder.unfinished, ranks.main):
            # another run may have completed it while this one waited for the lock
            if not ranks.from_main(lambda: _complete(folder, digest)):
                _build(builder, progress, ranks)
    if ranks.main:
        files.remove_stale_locks(root)
        hashes.save()
        _check_skipped(data, folder)
    ranks.barrier()
    return folder


def _build(builder: CacheBuilder, progress: Progress, ranks: Ranks) -> None:
    size = builder.data.encode_batch
    remedies = [f"encode_batch = {size // 2} (now {size})"] if size > 1 else []
    if cuda.may_be_there() and getattr(builder.backbone, "text_encoders", "cpu") != "cpu":
        remedies.append('backbone.text_encoders = "cpu"')
    if builder.media:
        remedies += smaller(builder.backbone, builder.data.size)
    try:
        kept = "Partitions that are encoded are kept; the same command continues"
        with memory.explain_exhaustion("encoding", remedies, kept):
            builder.encode(progress, ranks.rank, ranks.world)
        ranks.barrier()
        if ranks.main:
            builder.publish()
    finally:
        builder.backbone.release()


def _folder(root: Path, digest: str) -> Path:
    return root / digest[:16]


def _complete(folder: Path, digest: str) -> bool:
    """Return whether `folder` has a complete cache; DataError if it is the cache of another key."""
    if not (folder / DONE).exists():
        return False
    if Manifest.read(folder, rebuildable=True).key != digest:
        raise mds.damaged(folder / DONE, "its key does not match the folder's name", rebuildable=True)
    return True


def _check_skipped(data: Data, folder: Path) -> None:
    """Raise DataError if the cache was encoded with a larger `skip` and leaves out more than `skip` allows now."""
    if (manifest := Manifest.read(folder, rebuildable=True)).skipped > data.skip:
        total = manifest.skipped + manifest.count
        raise DataError(too_many_unreadable(json.loads((folder / SKIPPED).read_bytes()), total, data.skip))


# keys


def _count_and_key(
    data: Data, backbone: Backbone, media: bool, extra: Sequence[str], hashes: MediaHashes
) -> tuple[int, str]:
    """Return the number of examples, and the key of their cache."""
    total, examples = scan(data, media, hashes.digest, extra)
    project = hashes.file.parent.parent.parent  # above .corefit/cache/
    scores = {entry.name: _score_key(entry, project) for entry in data.score} if media else {}
    content = {**_compatibility(data, backbone, media), "media": media, "examples": examples, "scores": scores}
    return total, hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _compatibility(data: Data, backbone: Backbone, media: bool) -> dict[str, Any]:
    """Return the entries of the key in which a pipeline that reads the cache must agree with the one that wrote it."""
    fps = {"fps": data.fps} if data.fps else {}
    size = [list(bucket) for bucket in _bucket_sizes(data, backbone, media)]
    return {"format": FORMAT, "size": size, **fps, **backbone.encoding_key()}


def _bucket_sizes(data: Data, backbone: Backbone, media: bool) -> Sequence[buckets.Size]:
    return buckets.sizes(data.size, data.aspects if media else (), backbone)


def _score_key(entry: Weighted[Reward], project: Path) -> Mapping[str, str]:
    """Return what determines a reward's scores: its keys, a hash of the file that defines it, and what else it names.

    project  the folder of the pipeline, to which paths inside it are relative here
    """
    kind = type(entry.value)
    fields = [f for f in attrs.fields(kind) if f.init and not f.metadata.items() >= ROUNDING.items()]
    keys = {f.name: portable(str(getattr(entry.value, f.name)), project) for f in fields}
    also = {"scores_key()": entry.value.scores_key()} if isinstance(entry.value, KeyedReward) else {}
    return {**keys, **also, "code": sha256(Path(inspect.getfile(kind)))}


# partitions


@define(eq=False)
class CacheBuilder:
    """Encodes a cache in the folder `unfinished`, and renames it to `folder` when all partitions are complete.

    extra   the names of the further media
    digest  the key of the cache
    total   the number of examples in the source
    say     receives what there is to say besides progress
    """

    data: Data
    backbone: Backbone
    media: bool
    extra: Sequence[str]
    digest: str
    total: int
    folder: Path
    say: Callable[[str], None] = lambda text: None
    encoder: Encoder = field(init=False)

    def __attrs_post_init__(self) -> None:
        sizes = _bucket_sizes(self.data, self.backbone, self.media)
        shapes = [tuple(self.backbone.latent_shape(size)) for size in sizes]
        self.encoder = Encoder(
            self.data, self.backbone, self.media, sizes, shapes, extra=self.extra, coder=Coder(self.backbone, self.say)
        )

    @property
    def unfinished(self) -> Path:
        """The folder of the partitions until all are complete."""
        return self.folder.with_name(f"{self.folder.name}.parts")

    def encode(self, progress: Progress, rank: int, world: int) -> None:
        """Encode those of this rank's partitions (every world-th) that are not complete; DataError as for `prepare`."""
        import torch

        done, assigned = 0, range(rank, -(-self.total // PARTITION), world)
        share = sum(min(PARTITION, self.total - number * PARTITION) for number in assigned)
        captioned = map(self.data.triggered, self.data.raw_source.examples())
        for number, examples in enumerate(chunks(captioned, PARTITION)):
            if number in assigned:
                with torch.no_grad():
                    self._encode_partition(number, examples, lambda n, done=done: progress(done + n, share))
                done += len(examples)
                progress(done, share)
        check_readable(self.encoder.failed, self.total, self.data.skip)

    def _encode_partition(self, number: int, examples: Sequence[Example], progress: Callable[[int], None]) -> None:
        final, temporary = self.unfinished / partition_name(number), self.unfinished / f".{partition_name(number)}"
        if final.exists() and (record := Record.load(final)):
            self.encoder.failed += record.failed
            return
        shutil.rmtree(final, ignore_errors=True)  # a small file in it is damaged: only this partition is encoded again
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        encoder, failed, enlarged = self.encoder, len(self.encoder.failed), self.encoder.enlarged
        encoder.texts.clear()  # batching changes the last bits of a result: a partition must not depend on others
        try:
            count = partition.write(temporary, _counted(encoder.rows(examples), progress), encoder)
            enlarged = encoder.enlarged - enlarged
            Record(len(examples), count, encoder.failed[failed:], enlarged, encoder.cond).write(temporary)
            if len(encoder.failed) <= self.data.skip:
                files.publish(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def publish(self) -> None:
        """Merge the partitions into a complete cache, and rename it to its final name."""
        records = list(self._records())
        if (seen := sum(record.seen for record in records)) != self.total:
            shutil.rmtree(self.unfinished)
            raise DataError(f"the source gave {self.total} examples, then {seen}: it changed while being encoded")
        failed = [reason for record in records for reason in record.failed]
        check_readable(failed, self.total, self.data.skip)
        self._write_small_files(records, failed)
        if self.folder.exists():
            shutil.rmtree(self.folder)  # it has no manifest, as `prepare` has checked
        files.publish(self.unfinished, self.folder)

    def _records(self) -> Iterator[Record]:
        number = 0
        while (folder := self.unfinished / partition_name(number)).exists():
            if (record := Record.load(folder)) is None:
                raise mds.damaged(
                    folder / partition.RECORD, "it was changed after its partition was encoded", rebuildable=True
                )
            yield record
            number += 1

    def _write_small_files(self, records: Sequence[Record], failed: Sequence[str]) -> None:
        """Write the files that the partitions share: null condition, index, skipped.json and, last, the manifest."""
        from safetensors.torch import save

        encoder, names = self.encoder, [partition_name(number) for number in range(len(records))]
        written = [name for name, record in zip(names, records, strict=True) if record.count]
        encoder.cond = next(dict(record.cond) for record in records if record.cond)
        # safetensors' save_file would ignore the umask and let only the owner read the file
        (self.unfinished / NULL).write_bytes(save(encoder.null()))
        mds.merge_indexes(self.unfinished, written)
        texts.merge_indexes(self.unfinished, written)
        (self.unfinished / SKIPPED).write_text(json.dumps(failed, indent=1))
        small_files = [mds.INDEX, texts.INDEX, NULL, SKIPPED, *(f"{name}/{ROWS}" for name in names)]
        Manifest(
            key=self.digest,
            fits=_compatibility(self.data, self.backbone, self.media),
            count=sum(record.count for record in records),
            parts=len(records),
            media=self.media,
            sizes=tuple(encoder.sizes),
            shapes=tuple(encoder.shapes),
            cond=encoder.cond,
            skipped=len(failed),
            enlarged=sum(record.enlarged for record in records),
            files={name: sha256(self.unfinished / name) for name in small_files},
            extra=tuple(self.extra),
        ).write(self.unfinished)


def _counted(rows: Iterator[mds.Row], progress: Callable[[int], None]) -> Iterator[mds.Row]:
    for number, row in enumerate(rows):
        progress(number)
        yield row


# locks


@contextmanager
def _exclusive(root: Path, unfinished: Path, main: bool) -> Generator[None]:
    """Let one run at a time encode a cache; the lock is released with the process, however it ends."""
    if not main:
        yield
        return
    root.mkdir(parents=True, exist_ok=True)
    for stale in filter(_abandoned, root.iterdir()):
        if stale != unfinished:
            shutil.rmtree(stale, ignore_errors=True)
    try:
        with files.temporary_lock(unfinished.with_suffix(".lock")):
            yield
    finally:
        with suppress(OSError):  # a run that could not start leaves no empty folders behind
            unfinished.rmdir()
        with suppress(OSError):
            root.rmdir()


def _abandoned(folder: Path) -> bool:
    return UNFINISHED_NAME.fullmatch(folder.name) is not None and time.time() - folder.stat().st_mtime > ABANDONED
