"""Read caches: the manifest that describes one, and batches of its examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
from attrs import define, frozen

from corefit.data import lossless, mds, texts
from corefit.data.filter import Column, Filter, filter_rows
from corefit.data.mds import TensorSpec
from corefit.errors import DataError
from corefit.system import files
from corefit.types import Batch, Condition

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

DONE = "done.json"
NULL = "null.safetensors"
ROWS = "rows.jsonl"
FINGERPRINTS = "captions"
"""The key of the captions' fingerprints in a line of rows.jsonl."""
X0 = "x0"
COND = "cond."
TEXTS = "texts"
"""The column with the numbers of a row's captions; rows that were written before have the captions' tensors instead."""


@frozen
class Manifest:
    """The content of a cache's done.json, which is written last and makes the cache complete.

    key       the hash of everything that determines the cache
    fits      the entries of the key, such as encoders and sizes, in which a pipeline that reads the cache must agree
    count     the number of examples
    parts     the number of partitions, which are the folders part-00000 and so on
    media     whether latents were encoded
    sizes     the size of each bucket, in pixels
    shapes    the shape of one row's latents in each bucket, also if none were encoded
    cond      dtype and shape of each tensor of one caption's condition
    skipped   how many examples were left out; skipped.json names them
    enlarged  how many examples have media that are smaller than their bucket's size
    files     sha256 of the small files, all but the shards, by name
    extra     the names of the further media whose latents were encoded; none as version 0.1 wrote it
    """

    key: str
    fits: Mapping[str, Any]
    count: int
    parts: int
    media: bool
    sizes: tuple[tuple[int, ...], ...]
    shapes: tuple[tuple[int, ...], ...]
    cond: Mapping[str, TensorSpec]
    skipped: int
    enlarged: int
    files: Mapping[str, str]
    extra: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Write the manifest into `folder`, which makes the cache in it complete."""
        files.write_json(folder / DONE, attrs.asdict(self))

    @staticmethod
    def read(folder: Path, *, rebuildable: bool = False) -> Manifest:
        """Return the manifest of the cache in `folder`.

        `rebuildable` says that corefit wrote the cache and has its source, so that errors may advise to delete it.
        DataError if the folder has no manifest, or one of its small files is missing or changed.
        """
        if not rebuildable and not (folder / DONE).exists():
            raise DataError(
                f"{folder} holds no encoded data: there is no {DONE} in it. Name a folder that `corefit prepare` has "
                "written, or give the source instead ([data] source)"
            )
        try:
            raw = _read_manifest(folder / DONE)
            cond = {name: TensorSpec(s["dtype"], tuple(s["shape"])) for name, s in raw["cond"].items()}
            sizes, shapes = (tuple(map(tuple, raw[name])) for name in ("sizes", "shapes"))
            manifest = attrs.evolve(
                Manifest(**raw), sizes=sizes, shapes=shapes, cond=cond, extra=tuple(raw.get("extra", ()))
            )
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            what = str(error) if isinstance(error, files.Damaged) else f"{type(error).__name__}: {error}"
            raise mds.damaged(folder / DONE, what, rebuildable=rebuildable) from None
        for name, digest in manifest.files.items():
            file = folder / name
            if not file.is_file() or files.sha256(file) != digest:
                raise mds.damaged(
                    file, f"it is missing, or its sha256 is not the one in {DONE}", rebuildable=rebuildable
                )
        return manifest


@define(eq=False)
class Dataset:
    """A complete cache with a filter over its examples; `batch` reads some of them.

    null     the condition of one empty prompt, [1, ...]
    buckets  bucket (an index into `manifest.shapes`) -> indices of its kept examples; buckets without any are left out
    keep     the filter, if there is one
    columns  the metadata that the filter reads
    texts    the encoded captions; None where they are in the rows, as they were in older caches
    """

    manifest: Manifest
    shards: mds.Shards
    null: Condition
    buckets: Mapping[int, NDArray[np.int64]]
    keep: Filter | None = None
    columns: Sequence[Column] = ()
    texts: texts.Texts | None = None

    @staticmethod
    def open(
        folder: Path, remote: str | None = None, keep: Filter | None = None, *, rebuildable: bool = False
    ) -> Dataset:
        """Open the cache in `folder`; DataError names what is missing or damaged. Shards are hashed when first read.

        remote       the URL of the cache that `folder` is a copy of: small files are fetched now, a shard when first
                     read
        rebuildable  whether corefit wrote the cache and has its source, so that errors may advise to delete it
        """
        from safetensors.torch import load_file

        if remote:
            _fetch_small_files(folder, remote)
        manifest = Manifest.read(folder, rebuildable=rebuildable)
        shards = mds.Shards(folder, remote, rebuildable)
        if len(shards) != manifest.count:
            wrong = f"it counts {manifest.count} examples, the shards {len(shards)}"
            raise mds.damaged(folder / DONE, wrong, rebuildable=rebuildable)
        null, buckets, columns = Condition(load_file(folder / NULL)), {0: np.arange(manifest.count)}, list[Column]()
        if keep or len(manifest.sizes) > 1:
            buckets, columns = _filter(_read_rows(folder, manifest), keep)
        captions = texts.Texts.open(folder, remote, rebuildable) if texts.INDEX in manifest.files else None
        return Dataset(manifest, shards, null, buckets, keep, columns, captions)

    @property
    def key(self) -> str:
        """The hash of everything that determines the examples: of the cache and of the filter."""
        return filtered_key(self.manifest.key, self.keep)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one row's latents; that of the first bucket if there are several."""
        return self.manifest.shapes[0]

    @property
    def has_media(self) -> bool:
        return self.manifest.media

    def __len__(self) -> int:
        return sum(map(len, self.buckets.values()))

    def batch(
        self,
        indices: Sequence[int],
        rows: Sequence[int],
        caption_choices: Sequence[float] = (),
        extra: Sequence[str] = (),
    ) -> Batch:
        """Return the examples `indices`, all of one bucket, as rows numbered `rows`, on the CPU.

        An index that occurs several times is read once. `caption_choices` says for each row which of its example's
        captions to use, in [0, 1); the first by default. `extra` names the further media that the batch needs.
        """
        read = {index: self.shards[index] for index in dict.fromkeys(indices)}
        captions = [
            int(choice * len(read[index]["prompts"]))
            for index, choice in zip(indices, caption_choices or [0.0] * len(indices), strict=True)
        ]
        picked = list(zip((read[index] for index in indices), captions, strict=True))
        cond = self._conditions([(index, read[index], n) for index, n in zip(indices, captions, strict=True)])
        x0 = self._latents(read, indices, X0) if self.has_media else None
        return Batch(
            x0,
            Condition(cond),
            [row["prompts"][n] for row, n in picked],
            [row["meta"] for row, _ in picked],
            rows,
            self.shape if x0 is None else tuple(x0.shape[1:]),
            {name: self._latents(read, indices, latents_column(name)) for name in extra},
        )

    def _conditions(self, wanted: Sequence[tuple[int, mds.Row, int]]) -> dict[str, Tensor]:
        """Return the conditions of captions, of each the number of its row, the row, and its number in the row.

        A caption that several rows share is decoded once.
        """
        coded, keys = dict[tuple[str | int, int], mds.Row](), list[tuple[str | int, int]]()
        for index, row, n in wanted:
            keys.append((self.shards.partition(index), row[TEXTS][n]) if TEXTS in row else (index, n))
            if keys[-1] not in coded:
                coded[keys[-1]] = self._coded(index, row, n)
        places = {key: place for place, key in enumerate(coded)}
        order = [places[key] for key in keys] if len(places) < len(keys) else slice(None)
        try:
            return {
                name: texts.restore([row[COND + name] for row in coded.values()], spec)[order]
                for name, spec in self.manifest.cond.items()
            }
        except ValueError as error:
            raise mds.damaged(self.shards.folder / texts.INDEX, f"a caption cannot be decoded: {error}") from error

    def _coded(self, index: int, row: mds.Row, n: int) -> mds.Row:
        """Return the coded tensors of caption `n` of a row by column."""
        if TEXTS in row:
            assert self.texts is not None, "a row that names captions was written with an index of captions"
            return self.texts.read(self.shards.partition(index), row[TEXTS][n])
        of = len(row["prompts"])
        return {COND + name: lossless.PLAIN + caption_bytes(row[COND + name], n, of) for name in self.manifest.cond}

    def view(self, index: int) -> Mapping[str, Any]:
        """Return the "size" of an example's bucket, the size of its "source", and the "crop" of the source.

        "extra" has "source" and "crop" of each further medium, by name, if there are any.
        """
        return self.shards[index]["view"]

    def fingerprints(self) -> list[list[str]] | None:
        """Return the fingerprints of each kept example's captions; None if a cache of version 0.1 has none."""
        rows = _read_rows(self.shards.folder, self.manifest)
        kept = np.sort(np.concatenate(list(self.buckets.values())))
        found = [rows[index].get(FINGERPRINTS) for index in kept]
        return None if None in found else found

    def _latents(self, read: Mapping[int, mds.Row], indices: Sequence[int], column: str) -> Tensor:
        import torch

        place = {index: n for n, index in enumerate(read)}
        latents = torch.from_numpy(np.stack([row[column] for row in read.values()]))
        return latents[[place[index] for index in indices]] if len(read) < len(indices) else latents


def latents_column(name: str) -> str:
    """Return the column with the latents of the further medium `name`, or with those of the main one, ""."""
    return f"{X0}.{name}" if name else X0


def filtered_key(key: str, keep: Filter | None) -> str:
    """Return the hash of the examples that `keep` keeps of the cache with the hash `key`."""
    return key if keep is None else hashlib.sha256(f"{key} {keep.text}".encode()).hexdigest()


def caption_bytes(raw: bytes, number: int, of: int) -> bytes:
    """Return the bytes of one caption, of a tensor that has those of several."""
    size = len(raw) // of
    return raw[number * size : (number + 1) * size]


def _read_rows(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """Return {"bucket", "meta", "captions"} of each example; version 0.1 wrote no captions."""
    lines = (line for part in range(manifest.parts) for line in (folder / partition_name(part) / ROWS).open("rb"))
    return [json.loads(line) for line in lines]


def partition_name(number: int) -> str:
    """Return the name of a partition's folder."""
    return f"{mds.PARTITION_PREFIX}{number:05d}"


def _filter(
    rows: Sequence[Mapping[str, Any]], keep: Filter | None
) -> tuple[dict[int, NDArray[np.int64]], list[Column]]:
    """Return the indices of the kept examples by bucket, and what the filter read; DataError if it keeps none."""
    metas = [row["meta"] for row in rows]
    held = filter_rows(keep, metas) if keep else [True] * len(rows)
    columns = (
        [Column(name, [meta[name] for meta in metas if name in meta], held) for name in keep.names] if keep else []
    )
    bucket = np.array([row["bucket"] for row in rows])[held]
    if keep and not len(bucket):
        spans = ", ".join(span for column in columns if (span := column.value_range()))
        raise DataError(f"keep = {keep.text!r} keeps none of {len(rows)} examples: {spans}")
    numbers = np.flatnonzero(held)
    return {int(n): numbers[bucket == n] for n in np.unique(bucket)}, columns


def _fetch_small_files(folder: Path, remote: str) -> None:
    """Fetch the current manifest of `remote`, and those small files that `folder` lacks or has another version of."""
    with mds.locked(folder):
        manifest = mds.fetch(f"{remote}/{DONE}", folder / f"{DONE}.new")
        try:
            hashes: Mapping[str, str] = _read_manifest(manifest)["files"]
            for name, digest in hashes.items():
                if not (folder / name).is_file() or files.sha256(folder / name) != digest:
                    (folder / name).parent.mkdir(exist_ok=True)
                    mds.fetch(f"{remote}/{name}", folder / name)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise mds.damaged(f"{remote}/{DONE}", f"{type(error).__name__}: {error}") from None
        manifest.replace(folder / DONE)


def pack(tensor: Tensor) -> list[bytes]:
    """Return each row of a tensor [B, ...] as bytes, whatever its dtype (numpy has no bfloat16)."""
    import torch

    rows = tensor.detach().cpu().contiguous().reshape(len(tensor), -1)
    return [row.numpy().tobytes() for row in rows.view(torch.uint8)]


def _read_manifest(file: Path) -> Mapping[str, Any]:
    """Return the content of a manifest; up to version 0.1 it is nested under a key, next to its hash."""
    content = files.read_json(file, lambda content: set(content) == {"manifest", "sha256"})
    if "manifest" in content:
        if files.json_digest(content["manifest"]) != content["sha256"]:
            raise files.Damaged("its sha256 is not the one in it")
        return content["manifest"]
    return content
