"""The only reader of training data: which example is trained on when, and the batches themselves.

Order is a function of (seed, stage, step), never of rank or history, so a resumed run needs no state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs
from attrs import define, field, frozen, validators

from corefit import mds, rng
from corefit.errors import ConfigError
from corefit.types import Batch, Condition, ModelPath, Source

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

Order = Literal["epochs", "independent"]
DONE = "done.json"
NULL = "null.safetensors"
X0 = "x0"
COND = "cond."


def _positive(_: object, attribute: attrs.Attribute[Any], value: Sequence[int]) -> None:
    if len(value) != 2 or min(value) < 1:
        raise ValueError(f"{attribute.name} is {list(value)}, expected [height, width] in pixels")


@frozen
class Data:
    """What stages train on: raw examples, and how they are encoded, once, into a cache."""

    source: Source | None = None
    """Where prompts and media come from."""
    encoded: ModelPath | None = None
    """In place of a source: what was encoded before, a folder or a URL such as s3://bucket/cache/0123456789abcdef."""
    size: tuple[int, int] = field(default=(512, 512), validator=_positive)
    """Height and width in pixels; the shortest side is resized, the centre kept."""
    skip: int = field(default=0, validator=validators.ge(0))
    """Missing or unreadable media that may be left out (and are counted) before a run stops."""
    order: Order = "epochs"
    """epochs: every example once, shuffled, then again; independent: each step draws prompts anew (Flow-GRPO)."""
    encode_batch: int = field(default=16, validator=validators.ge(1))
    """Prompts or pictures that the text encoders or the VAE see at once."""

    def __attrs_post_init__(self) -> None:
        if (self.source is None) == (self.encoded is None):
            raise ValueError("one of 'source' and 'encoded' says where examples come from: give one of the two")
        if self.encoded is not None and self.skip:
            raise ValueError("'skip' is of a source: what is encoded has been read before; remove it")

    @property
    def raw(self) -> Source:
        """The source, where there is one."""
        assert self.source is not None, "what is encoded before has no source"
        return self.source


@frozen
class Spec:
    """One row of a tensor: a torch dtype by name, and a shape."""

    dtype: str
    shape: tuple[int, ...]


@frozen
class Manifest:
    """done.json of a cache, written last.

    key       hash of everything that determines the cache
    fits      what of it is not the examples: encoders, size; they must be those of whoever reads it
    count     examples in it
    media     whether latents were encoded
    shape     of one row's latents, also where none were encoded
    cond      the tensors of one row's condition
    skipped   examples left out; skipped.json names them
    enlarged  pictures that were smaller than `size`
    files     name -> sha256 of the small files beside the shards
    """

    key: str
    fits: Mapping[str, Any]
    count: int
    media: bool
    shape: tuple[int, ...]
    cond: Mapping[str, Spec]
    skipped: int
    enlarged: int
    files: Mapping[str, str]

    def write(self, folder: Path) -> None:
        """Declare the cache in `folder` complete."""
        body = attrs.asdict(self)
        (folder / DONE).write_text(json.dumps({"sha256": _digest(body), "manifest": body}, indent=1))

    @staticmethod
    def read(folder: Path) -> Manifest:
        """DataError where the cache is incomplete, or one of its small files is not as written."""
        try:
            done = json.loads((folder / DONE).read_bytes())
            raw: dict[str, Any] = done["manifest"]
            if _digest(raw) != done["sha256"]:
                raise ValueError("its sha256 is not the one in it")
            cond = {name: Spec(s["dtype"], tuple(s["shape"])) for name, s in raw["cond"].items()}
            manifest = attrs.evolve(Manifest(**raw), shape=tuple(raw["shape"]), cond=cond)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise mds.damaged(folder / DONE, f"{type(error).__name__}: {error}") from None
        for name, digest in manifest.files.items():
            file = folder / name
            if not file.is_file() or sha256(file) != digest:
                raise mds.damaged(file, f"it is missing, or its sha256 is not the one in {DONE}")
        return manifest


@define(eq=False)
class Dataset:
    """A complete cache; `batch` reads from it.

    null   the condition of one empty prompt, [1, ...]
    shape  of one row's latents, also where there are none
    """

    manifest: Manifest
    shards: mds.Shards
    null: Condition

    @staticmethod
    def open(folder: Path, remote: str | None = None) -> Dataset:
        """DataError names what is missing or damaged; shards are hashed when first read.

        remote  URL of the cache of which `folder` holds copies: small files now, shards when first read
        """
        from safetensors.torch import load_file

        if remote:
            _fetch_small(folder, remote)
        manifest = Manifest.read(folder)
        shards = mds.Shards(folder, remote)
        if len(shards) != manifest.count:
            raise mds.damaged(folder / DONE, f"it counts {manifest.count} examples, the shards {len(shards)}")
        return Dataset(manifest, shards, Condition(load_file(folder / NULL)))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.manifest.shape

    @property
    def has_media(self) -> bool:
        return self.manifest.media

    def __len__(self) -> int:
        return self.manifest.count

    def batch(self, indices: Sequence[int], rows: Sequence[int]) -> Batch:
        """The examples `indices`, as rows numbered `rows`; on the CPU, each read once however often it occurs."""
        read = {index: self.shards[index] for index in dict.fromkeys(indices)}
        place = {index: n for n, index in enumerate(read)}
        pick = [place[index] for index in indices]
        cond = {
            name: unpack([row[COND + name] for row in read.values()], spec)[pick]
            for name, spec in self.manifest.cond.items()
        }
        return Batch(
            self._latents(read.values(), pick) if self.has_media else None,
            Condition(cond),
            [read[index]["prompt"] for index in indices],
            [read[index]["meta"] for index in indices],
            rows,
            self.shape,
        )

    def _latents(self, read: Any, pick: Sequence[int]) -> Tensor:
        return unpack([row[X0].tobytes() for row in read], Spec("float32", self.shape))[pick]


def _fetch_small(folder: Path, remote: str) -> None:
    """The manifest as it is there now, and the small files that it names unless they are here."""
    with mds.locked(folder):
        fresh = mds.fetch(f"{remote}/{DONE}", folder / f"{DONE}.new")
        try:
            files: Mapping[str, str] = json.loads(fresh.read_bytes())["manifest"]["files"]
            for name, digest in files.items():
                if not (folder / name).is_file() or sha256(folder / name) != digest:
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


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def indices(n: int, step: int, batch: int, group: int, *, seed: int, stage: str | int, order: Order) -> list[int]:
    """Which of n examples the global batch of `step` holds, [batch]; a prompt's `group` rows follow each other.

    epochs       keyed permutations one after the other: each example once an epoch, whatever the batch
    independent  batch / group different prompts a step, as Flow-GRPO's DistributedKRepeatSampler draws them
                 from (seed, step); its shuffle over ranks is left out, so that groups stay whole
    """
    prompts = batch // group
    if order == "independent":
        chosen = _drawn(n, prompts, seed + step)
    else:
        walked = range(step * prompts, (step + 1) * prompts)
        chosen = [int(_permutation(n, seed, stage, at // n)[at % n]) for at in walked]
    return [index for index in chosen for _ in range(group)]


def _drawn(n: int, prompts: int, seed: int) -> list[int]:
    import torch

    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return [int(index) for index in shuffled[:prompts]]


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, stage: str | int, epoch: int) -> NDArray[np.int64]:
    return rng.generator(seed, stage, "order", epoch).permutation(n)


def check_batch(n: int, batch: int, group: int, world: int, order: Order) -> None:
    """ConfigError where n examples cannot fill batches of whole groups on `world` ranks."""
    if batch % group or (batch // group) % world:
        nearest = max(round(batch / (group * world)), 1) * group * world
        raise ConfigError(
            f"batch = {batch} cannot be split into whole groups of {group} on {world} ranks; it must be a multiple of "
            f"{group} x {world} = {group * world}, such as {nearest}"
        )
    if order == "independent" and batch // group > n:
        raise ConfigError(
            f'order = "independent" draws batch / group = {batch // group} different prompts a step and the data '
            f'have {n}; lower batch or raise group, or set order = "epochs" under [data]'
        )


def batches(
    dataset: Dataset,
    *,
    start: int,
    batch: int,
    group: int,
    seed: int,
    stage: str | int,
    order: Order,
    rank: int,
    world: int,
    device: torch.device | str,
) -> Generator[Batch, None, None]:
    """This rank's batches from step `start` on, endlessly; rows of step s are numbered from s * batch.

    A rank gets a contiguous slice of whole groups. The next batch is read in a thread, which ends when the
    iterator is closed; what went wrong there is raised here. ConfigError as `check_batch`.
    """
    check_batch(len(dataset), batch, group, world, order)
    share = batch // world
    pinned = str(device).startswith("cuda")

    def load(step: int) -> Batch:
        mine = slice(rank * share, (rank + 1) * share)
        wanted = indices(len(dataset), step, batch, group, seed=seed, stage=stage, order=order)[mine]
        loaded = dataset.batch(wanted, range(step * batch, (step + 1) * batch)[mine])
        return _each(loaded, lambda t: t.pin_memory()) if pinned else loaded

    return _ahead(load, start, device)


def _ahead(load: Callable[[int], Batch], start: int, device: torch.device | str) -> Generator[Batch, None, None]:
    with ThreadPoolExecutor(1, thread_name_prefix="corefit-data") as pool:
        coming = pool.submit(load, start)
        for step in count(start + 1):
            batch = coming.result()
            coming = pool.submit(load, step)
            yield _each(batch, lambda t: t.to(device, non_blocking=True))


def _each(batch: Batch, f: Callable[[Tensor], Tensor]) -> Batch:
    cond = Condition({name: f(t) for name, t in batch.cond.tensors.items()})
    return attrs.evolve(batch, x0=None if batch.x0 is None else f(batch.x0), cond=cond)
