"""Encoded data as they lie in a cache, and the examples of a batch read from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
from attrs import define, frozen

from corefit.data import mds
from corefit.data.filter import Column, Keep, kept
from corefit.errors import DataError
from corefit.system import files
from corefit.types import Batch, Condition

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

DONE = "done.json"
NULL = "null.safetensors"
ROWS = "rows.jsonl"
X0 = "x0"
COND = "cond."


@frozen
class Spec:
    """One row of a tensor: a torch dtype by name, and a shape."""

    dtype: str
    shape: tuple[int, ...]


@frozen
class Manifest:
    """done.json of a cache, written last.

    key       hash of everything that determines the cache
    fits      what of it is not the examples: encoders, sizes; they must be those of whoever reads it
    count     examples in it
    parts     folders that they lie in, part-00000 and so on, in order
    media     whether latents were encoded
    sizes     of the buckets, in pixels
    shapes    of one row's latents of each bucket, also where none were encoded
    cond      the tensors of one caption's condition
    skipped   examples left out; skipped.json names them
    enlarged  pictures that were smaller than their bucket
    files     name -> sha256 of the small files beside the shards
    """

    key: str
    fits: Mapping[str, Any]
    count: int
    parts: int
    media: bool
    sizes: tuple[tuple[int, ...], ...]
    shapes: tuple[tuple[int, ...], ...]
    cond: Mapping[str, Spec]
    skipped: int
    enlarged: int
    files: Mapping[str, str]

    def write(self, folder: Path) -> None:
        """Declare the cache in `folder` complete."""
        files.write_json(folder / DONE, attrs.asdict(self))

    @staticmethod
    def read(folder: Path, *, remade: bool = False) -> Manifest:
        """Return the manifest of the cache in `folder`; `remade` where corefit has made it and has its source.

        DataError where the folder holds none, or one of its small files is not as written.
        """
        if not remade and not (folder / DONE).exists():
            raise DataError(
                f"{folder} holds no encoded data: there is no {DONE} in it. Name a folder that `corefit prepare` has "
                "made, or give the source instead ([data] source)"
            )
        try:
            raw = _said(folder / DONE)
            cond = {name: Spec(s["dtype"], tuple(s["shape"])) for name, s in raw["cond"].items()}
            sizes, shapes = (tuple(map(tuple, raw[name])) for name in ("sizes", "shapes"))
            manifest = attrs.evolve(Manifest(**raw), sizes=sizes, shapes=shapes, cond=cond)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            what = str(error) if isinstance(error, files.Damaged) else f"{type(error).__name__}: {error}"
            raise mds.damaged(folder / DONE, what, remade=remade) from None
        for name, digest in manifest.files.items():
            file = folder / name
            if not file.is_file() or files.sha256(file) != digest:
                raise mds.damaged(file, f"it is missing, or its sha256 is not the one in {DONE}", remade=remade)
        return manifest


@define(eq=False)
class Dataset:
    """A complete cache, and which of its examples are kept; `batch` reads from it.

    null     the condition of one empty prompt, [1, ...]
    buckets  numbers of the kept examples of each bucket that has any, and which of `manifest.shapes` it is
    columns  the values by which examples are kept
    """

    manifest: Manifest
    shards: mds.Shards
    null: Condition
    buckets: Mapping[int, NDArray[np.int64]]
    keep: Keep | None = None
    columns: Sequence[Column] = ()

    @staticmethod
    def open(folder: Path, remote: str | None = None, keep: Keep | None = None, *, remade: bool = False) -> Dataset:
        """DataError names what is missing or damaged; shards are hashed when first read.

        remote  URL of the cache of which `folder` holds copies: small files now, shards when first read
        remade  whether corefit has made `folder`, and has the source to make it again
        """
        from safetensors.torch import load_file

        if remote:
            _fetch_small(folder, remote)
        manifest = Manifest.read(folder, remade=remade)
        shards = mds.Shards(folder, remote, remade)
        if len(shards) != manifest.count:
            wrong = f"it counts {manifest.count} examples, the shards {len(shards)}"
            raise mds.damaged(folder / DONE, wrong, remade=remade)
        null, buckets, columns = Condition(load_file(folder / NULL)), {0: np.arange(manifest.count)}, list[Column]()
        if keep or len(manifest.sizes) > 1:
            buckets, columns = _kept(_rows(folder, manifest), keep)
        return Dataset(manifest, shards, null, buckets, keep, columns)

    @property
    def key(self) -> str:
        """Hash of everything that determines what is trained on."""
        return kept_key(self.manifest.key, self.keep)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one row's latents, where all have one; of the first bucket otherwise."""
        return self.manifest.shapes[0]

    @property
    def has_media(self) -> bool:
        return self.manifest.media

    def __len__(self) -> int:
        return sum(map(len, self.buckets.values()))

    def batch(self, indices: Sequence[int], rows: Sequence[int], turns: Sequence[float] = ()) -> Batch:
        """The examples `indices`, of one bucket, as rows numbered `rows`; on the CPU, each read once.

        turns  which caption of its example each row gets, in [0, 1); the first by default
        """
        read = {index: self.shards[index] for index in dict.fromkeys(indices)}
        captions = [
            int(turn * len(read[index]["prompts"]))
            for index, turn in zip(indices, turns or [0.0] * len(indices), strict=True)
        ]
        picked = list(zip((read[index] for index in indices), captions, strict=True))
        cond = {
            name: unpack([_part(row[COND + name], n, len(row["prompts"])) for row, n in picked], spec)
            for name, spec in self.manifest.cond.items()
        }
        x0 = self._latents(read, indices) if self.has_media else None
        return Batch(
            x0,
            Condition(cond),
            [row["prompts"][n] for row, n in picked],
            [row["meta"] for row, _ in picked],
            rows,
            self.shape if x0 is None else tuple(x0.shape[1:]),
        )

    def view(self, index: int) -> Mapping[str, Any]:
        """How an example's media became what is trained on: "size" of its bucket, "source" size, "crop" of it."""
        return self.shards[index]["view"]

    def _latents(self, read: Mapping[int, mds.Row], indices: Sequence[int]) -> Tensor:
        import torch

        place = {index: n for n, index in enumerate(read)}
        latents = torch.from_numpy(np.stack([row[X0] for row in read.values()]))
        return latents[[place[index] for index in indices]] if len(read) < len(indices) else latents


def kept_key(key: str, keep: Keep | None) -> str:
    """Key of what a condition keeps of the cache of `key`."""
    return key if keep is None else hashlib.sha256(f"{key} {keep.text}".encode()).hexdigest()


def _part(raw: bytes, number: int, of: int) -> bytes:
    size = len(raw) // of
    return raw[number * size : (number + 1) * size]


def _rows(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """{"bucket", "meta"} of each example."""
    lines = (line for part in range(manifest.parts) for line in (folder / part_name(part) / ROWS).open("rb"))
    return [json.loads(line) for line in lines]


def part_name(number: int) -> str:
    """Folder of a part of a cache."""
    return f"{mds.PART}{number:05d}"


def _kept(rows: Sequence[Mapping[str, Any]], keep: Keep | None) -> tuple[dict[int, NDArray[np.int64]], list[Column]]:
    """The kept examples by bucket; DataError where there are none."""
    metas = [row["meta"] for row in rows]
    held = kept(keep, metas) if keep else [True] * len(rows)
    columns = (
        [Column(name, [meta[name] for meta in metas if name in meta], held) for name in keep.names] if keep else []
    )
    bucket = np.array([row["bucket"] for row in rows])[held]
    if keep and not len(bucket):
        spans = ", ".join(span for column in columns if (span := column.span()))
        raise DataError(f"keep = {keep.text!r} keeps none of {len(rows)} examples: {spans}")
    numbers = np.flatnonzero(held)
    return {int(n): numbers[bucket == n] for n in np.unique(bucket)}, columns


def _fetch_small(folder: Path, remote: str) -> None:
    """The manifest as it is there now, and the small files that it names unless they are here."""
    with mds.locked(folder):
        fresh = mds.fetch(f"{remote}/{DONE}", folder / f"{DONE}.new")
        try:
            hashes: Mapping[str, str] = _said(fresh)["files"]
            for name, digest in hashes.items():
                if not (folder / name).is_file() or files.sha256(folder / name) != digest:
                    (folder / name).parent.mkdir(exist_ok=True)
                    mds.fetch(f"{remote}/{name}", folder / name)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise mds.damaged(f"{remote}/{DONE}", f"{type(error).__name__}: {error}") from None
        fresh.replace(folder / DONE)


def pack(tensor: Tensor) -> list[bytes]:
    """Each row of [B, ...] as bytes, whatever its dtype (numpy has no bfloat16)."""
    import torch

    rows = tensor.detach().cpu().contiguous().reshape(len(tensor), -1)
    return [row.numpy().tobytes() for row in rows.view(torch.uint8)]


def unpack(rows: Sequence[bytes], spec: Spec) -> Tensor:
    """The inverse of `pack`, [B, ...]."""
    import torch

    dtype = getattr(torch, spec.dtype)
    return torch.frombuffer(bytearray(b"".join(rows)), dtype=dtype).reshape(len(rows), *spec.shape)


def _said(file: Path) -> Mapping[str, Any]:
    """The content of a manifest; that of version 0.1 and before lies under a key, beside its hash."""
    content = files.read_json(file, lambda content: set(content) == {"manifest", "sha256"})
    if "manifest" in content:
        if files.json_digest(content["manifest"]) != content["sha256"]:
            raise files.Damaged("its sha256 is not the one in it")
        return content["manifest"]
    return content
