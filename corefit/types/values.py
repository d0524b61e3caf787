"""The values that objectives, samplers, backbones and the trainer hand to each other.

Latents keep their natural layout: images [B, C, H, W], video [B, C, T, H, W], packed tokens [B, L, C].
sigma is in [0, 1], where 1 is pure noise and 0 is clean; x = (1 - sigma) x0 + sigma noise; velocity = noise - x0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, NewType, TypeVar, get_args

from attrs import field, frozen, validators

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Rows = slice | Sequence[int] | Tensor

T = TypeVar("T")
Meta = Mapping[str, Any]
MOST = 1_000_000
"""The largest number that a plugin may declare of anything that is counted for a step: rows, terms, updates."""
ROUNDING: Mapping[str, bool] = {"corefit.rounding": True}
"""Marks a plugin's field that changes only how results are rounded: `chunk: int = field(default=1, metadata=ROUNDING)`.

When such a key changes, a finished stage stays finished and an interrupted one continues from its checkpoint. It is
meant for keys that trade memory for time, such as the number of rows of a forward. The key must not change a random
draw.
"""
ModelPath = NewType("ModelPath", str)
"""A diffusers folder, relative to the pipeline file, or a name on the hub ("organization/model")."""
Url = NewType("Url", str)
"""The address of raw data, such as s3://bucket/data.jsonl, which fsspec reads; keys and passwords are never in it."""


def key_of(name: str) -> str:
    """Return the key of the field `name`: the same, but for the underscore at the end of a name such as `from_`.

    Python has reserved the word without it, or the class has an attribute of that name.
    """
    return name.removesuffix("_")


@frozen(eq=False)
class Condition:
    """Holds named tensors [B, ...], such as text embeddings, that only the backbone that made them reads."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Rows) -> Condition:
        return Condition({name: t[rows] for name, t in self.tensors.items()})

    def to(self, device: torch.device | str) -> Condition:
        """Return the same condition on `device`; dtypes stay."""
        return Condition({name: t.to(device, non_blocking=True) for name, t in self.tensors.items()})

    def repeat(self, times: int) -> Condition:
        """Return `times` copies one after the other, [times * B, ...], for a batch with several states of each row."""
        if times == 1:
            return self
        return Condition({name: t.repeat(times, *(1,) * (t.ndim - 1)) for name, t in self.tensors.items()})

    def where(self, keep: Tensor, other: Condition) -> Condition:
        """Return the rows of self where `keep` [B] (bool) is true, and the rows of `other` elsewhere."""
        return Condition(
            {
                name: t.where(keep.reshape(-1, *(1,) * (t.ndim - 1)), other.tensors[name])
                for name, t in self.tensors.items()
            }
        )

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Concatenate the rows of several conditions, in order."""
        import torch

        names = conditions[0].tensors
        return Condition({name: torch.cat([each.tensors[name] for each in conditions]) for name in names})


@frozen(eq=False)
class Batch:
    """Holds the samples of one step on one rank.

    x0       clean latents [B, ...] in float32; None for data with prompts only
    cond     the condition of the prompts
    prompts  the prompts as text, B of them
    meta     the metadata of the source, one mapping for each row
    rows     global sample numbers, unique in a stage and independent of the number of ranks
    shape    the shape of one row's latents, also if x0 is None
    extra    latents [B, ...] of further media by their name, such as "rejected", in the shape and dtype of x0; only
             those that the objective's `uses` names ("media:rejected")
    """

    x0: Tensor | None
    cond: Condition
    prompts: Sequence[str]
    meta: Sequence[Meta]
    rows: Sequence[int]
    shape: tuple[int, ...]
    extra: Mapping[str, Tensor] = field(factory=dict[str, "Tensor"])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice) -> Batch:
        return Batch(
            None if self.x0 is None else self.x0[rows],
            self.cond[rows],
            self.prompts[rows],
            self.meta[rows],
            self.rows[rows],
            self.shape,
            {name: latents[rows] for name, latents in self.extra.items()},
        )

    @property
    def metrics(self) -> Mapping[str, Tensor]:
        """An empty mapping: a batch has nothing to log when an objective uses it as its part."""
        return {}

    @property
    def clean(self) -> Tensor:
        """x0 [B, ...], not None: a pipeline whose objective `uses` media is refused without them before it starts."""
        assert self.x0 is not None, "an objective that reads clean latents must say so in `uses`"
        return self.x0


@frozen(eq=False)
class Step:
    """The Gaussian transition of one sampler step, with mean [B, ...] and the whole standard deviation std [B].

    x_next = mean + expand_like(std, x) * noise; with std 0 the step is deterministic.
    """

    mean: Tensor
    std: Tensor


@frozen(eq=False)
class Term:
    """The SUM of the losses of supervised items, and the number of items.

    total    scalar with a graph; the trainer runs backward on it and frees the graph at once
    count    the number of items, as a number, or as a scalar tensor if it depends on the data; totals are divided
             once, by the count summed over terms, micro-batches and ranks (SOAR, eq. 15)
    metrics  names with detached values [n], one for each item; their means over all ranks are logged
    """

    total: Tensor
    count: float | Tensor
    metrics: Mapping[str, Tensor] = field(factory=dict[str, "Tensor"])

    @staticmethod
    def of(loss: Tensor, weight: float = 1.0, **metrics: Tensor) -> Term:
        """Make a term from the losses [n] of its items; `weight` multiplies the total, not the count.

        Raises ValueError if the losses are not [n].
        """
        if loss.ndim != 1:
            raise ValueError(
                f"Term.of takes losses [n], one for each item, and got {list(loss.shape)}: pass neither their mean nor "
                "one loss for each element (corefit.flow.per_sample)"
            )
        detached = {name: value.detach() for name, value in metrics.items()}
        return Term(loss.sum() * weight, float(len(loss)), {"loss": loss.detach(), **detached})


@frozen(eq=False)
class Moving:
    """How a copy of the trained weights follows them: copy <- decay * copy + (1 - decay) * weights.

    The copy starts as the weights at the beginning of the stage. A decay of 1 leaves it there, 0 makes it the weights.
    It moves as well when the optimizer steps of a batch were skipped (`on_nan = "skip"`).

    decay  gives the decay, in [0, 1], of the n-th move of the stage, counted from 1; it must depend on n alone
    per    when the copy moves: once after all optimizer steps on a batch, or after each optimizer step
    """

    decay: Callable[[int], float] = field(validator=validators.is_callable())
    per: Literal["batch", "update"] = field(default="batch", validator=validators.in_(("batch", "update")))


@frozen(eq=False)
class Scores:
    """What the rewards of a stage give for the samples of a batch.

    total  the weighted sum of the rewards [B], each normalized as its `normalize` says: what objectives learn from
    each   the scores [B] of each reward by its name, as the reward gave them
    raw    the weighted sum [B] of `each`, for the log; None where no reward is normalized, as it is `total` then
    """

    total: Tensor
    each: Mapping[str, Tensor]
    raw: Tensor | None = None

    @property
    def metrics(self) -> Mapping[str, Tensor]:
        """What is logged: `reward`, the weighted sum without normalization, and `reward/NAME` of several rewards."""
        each = {f"reward/{name}": values for name, values in self.each.items()} if len(self.each) > 1 else {}
        return {"reward": self.total if self.raw is None else self.raw, **each}


@frozen(eq=False)
class ArchiveMember:
    """A media file inside an archive, or in another place where it is no file of this machine, such as a store.

    name     its name in messages; the suffix tells its format
    read     returns its bytes, at each call
    file     a file, such as the archive, that changes whenever the bytes change
    version  in place of `file`: returns a text that changes whenever the bytes change, such as the etag that a store
             gives, and is found without reading them; "" where there is none

    Where neither is given, the bytes are read and hashed each time that a run starts.
    """

    name: str
    read: Callable[[], bytes]
    file: Path | None = None
    version: Callable[[], str] | None = None


@frozen(eq=False)
class Example:
    """One raw example of a source.

    prompt  a prompt, or several captions of which one is drawn each time the example is used
    media   a picture or video file, a folder of frames, a file inside an archive, or an array in memory, uint8
            [H, W, 3] or [T, H, W, 3]; None for a prompt alone
    meta    the example's metadata, which rewards and `[data] keep` can read
    extra   further media of the same example by name, such as "rejected", each of the kinds that `media` may be
    """

    prompt: str | Sequence[str]
    media: Path | ArchiveMember | Any | None = None
    meta: Meta = field(factory=dict[str, Any])
    extra: Mapping[str, Path | ArchiveMember | Any] = field(factory=dict[str, Any])

    @property
    def prompts(self) -> tuple[str, ...]:
        """The captions, one or more."""
        return (self.prompt,) if isinstance(self.prompt, str) else tuple(self.prompt)


@frozen(kw_only=True)
class Suggested:
    """What a backbone class suggests for its family (`suggested` of Preset).

    path      a model of the family on the hub
    size      [height, width] that the model makes, or [frames, height, width] of clips
    guidance  scale of classifier-free guidance for samples
    steps     number of sampling steps
    """

    path: str
    size: tuple[int, ...]
    guidance: float
    steps: int


def _finite(_: object, __: object, weight: float) -> None:
    if not math.isfinite(weight):
        raise ValueError(f"'weight' must be a number, not {weight}")


Normalization = Literal["none", "batch"]
"""What is done to a reward's scores before they are weighted and added; "batch" divides by their spread."""


def _normalization(_: object, __: object, given: object) -> None:
    known = get_args(Normalization)
    if given not in known:
        raise ValueError(f"'normalize' must be one of {', '.join(map(repr, known))}, not {given!r}")


@frozen(eq=False)
class Weighted(Generic[T]):
    """A plugin with a weight: one of a stage's rewards, or one of the objectives of a sum.

    name       the name under which it is logged: that of `use`, unless the entry has a `name` of its own, by which
               several entries of one plugin are told apart
    value      the reward or the objective
    weight     the factor of its score or loss
    normalize  what is done to the scores of a stage's reward before they are weighted; "batch" subtracts their mean
               over the batch of all processes and divides by their standard deviation
    """

    name: str
    value: T
    weight: float = field(default=1.0, validator=_finite)
    normalize: Normalization = field(default="none", validator=_normalization)

    @property
    def reward(self) -> T:
        """`value`, under the name that it had in version 0.1."""
        return self.value
