"""The values that objectives, samplers, backbones and the trainer hand to each other.

Latents keep their natural layout: images [B, C, H, W], video [B, C, T, H, W], packed tokens [B, L, C].
sigma is in [0, 1]: 1 is pure noise, 0 is clean; x = (1 - sigma) x0 + sigma noise; velocity = noise - x0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NewType, TypeVar

from attrs import field, frozen

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Rows = slice | Sequence[int] | Tensor

T = TypeVar("T")
Meta = Mapping[str, Any]
MOST = 1_000_000
"""A plugin may declare no more of anything that is counted for a step: rows, terms, updates."""
ROUNDING: Mapping[str, bool] = {"corefit.rounding": True}
"""Metadata of a plugin's field whose value changes how results are rounded, and nothing else: field(metadata=ROUNDING).

A stage that is finished stays so when the key changes, and one that was interrupted goes on from its checkpoint. For
keys that trade memory for time, such as how many rows a forward holds; none may change a random draw.
"""
ModelPath = NewType("ModelPath", str)
"""A diffusers folder, relative to the pipeline file, or a name on the hub ("organisation/model")."""


@frozen(eq=False)
class Condition:
    """Named [B, ...] tensors that one backbone made and only it reads (text embeddings, for example)."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Rows) -> Condition:
        return Condition({name: t[rows] for name, t in self.tensors.items()})

    def to(self, device: torch.device | str) -> Condition:
        """The same condition on `device`; dtypes stay."""
        return Condition({name: t.to(device, non_blocking=True) for name, t in self.tensors.items()})

    def repeat(self, times: int) -> Condition:
        """`times` copies one after the other, [times * B, ...]: what a batch of several states needs."""
        if times == 1:
            return self
        return Condition({name: t.repeat(times, *(1,) * (t.ndim - 1)) for name, t in self.tensors.items()})

    def where(self, keep: Tensor, other: Condition) -> Condition:
        """Rows of self where `keep` [B] (bool) is true, rows of `other` elsewhere."""
        return Condition(
            {
                name: t.where(keep.reshape(-1, *(1,) * (t.ndim - 1)), other.tensors[name])
                for name, t in self.tensors.items()
            }
        )

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Rows of all parts, in order."""
        import torch

        return Condition({name: torch.cat([p.tensors[name] for p in parts]) for name in parts[0].tensors})


@frozen(eq=False)
class Batch:
    """Samples of one step on one rank.

    x0      clean latents [B, ...] in float32; None for prompt-only data
    cond    the prompts' condition
    prompts the prompts themselves
    meta    one mapping a row: whatever the source said besides
    rows    global sample numbers, unique in a stage and independent of the number of ranks
    shape   of one row's latents, also where x0 is None
    """

    x0: Tensor | None
    cond: Condition
    prompts: Sequence[str]
    meta: Sequence[Meta]
    rows: Sequence[int]
    shape: tuple[int, ...]

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
        )

    @property
    def metrics(self) -> Mapping[str, Tensor]:
        return {}

    @property
    def clean(self) -> Tensor:
        """x0 [B, ...] of a batch that has media; pipelines that lack them are refused before they start."""
        assert self.x0 is not None, "an objective that reads clean latents must say so in `uses`"
        return self.x0


@frozen(eq=False)
class Step:
    """The Gaussian transition of one sampler step: mean [B, ...], whole standard deviation std [B].

    std 0 is deterministic. x_next = mean + like(std, x) * noise.
    """

    mean: Tensor
    std: Tensor


@frozen(eq=False)
class Term:
    """A SUM over supervised items, and how many there were.

    total    scalar, on the graph; the trainer runs backward on it and frees the graph at once
    count    items (a number, or a scalar tensor where it depends on the data); totals are divided once,
             by the count summed over terms, micro-batches and ranks (SOAR, eq. 15)
    metrics  name -> detached values [n], one an item; logged as means over all ranks
    """

    total: Tensor
    count: float | Tensor
    metrics: Mapping[str, Tensor] = field(factory=dict[str, "Tensor"])

    @staticmethod
    def of(loss: Tensor, weight: float = 1.0, **metrics: Tensor) -> Term:
        """A term from the losses of its items, [n]; `weight` multiplies the total, not the count.

        Raises ValueError for losses that are not one an item.
        """
        if loss.ndim != 1:
            raise ValueError(
                f"Term.of takes losses [n], one an item, and was given {list(loss.shape)}: not their mean, and not one "
                "for each element (corefit.flow.per_sample)"
            )
        detached = {name: value.detach() for name, value in metrics.items()}
        return Term(loss.sum() * weight, float(len(loss)), {"loss": loss.detach(), **detached})


@frozen(eq=False)
class ArchiveMember:
    """Media inside an archive.

    name  what messages call it; its suffix says what it is
    read  its bytes, whenever they are asked for
    file  one that does not change unless they do
    """

    name: str
    read: Callable[[], bytes]
    file: Path


@frozen(eq=False)
class Example:
    """One raw example of a source.

    prompt: one, or several captions of which each time one is drawn.
    media: a picture or video file, a folder of frames, what an archive holds, or an array in memory, uint8 [H, W, 3]
    or [T, H, W, 3]; None for a prompt alone.
    """

    prompt: str | Sequence[str]
    media: Path | ArchiveMember | Any | None = None
    meta: Meta = field(factory=dict[str, Any])

    @property
    def prompts(self) -> tuple[str, ...]:
        """All captions, one or more."""
        return (self.prompt,) if isinstance(self.prompt, str) else tuple(self.prompt)


def _finite(_: object, __: object, weight: float) -> None:
    if not math.isfinite(weight):
        raise ValueError(f"'weight' must be a number, not {weight}")


@frozen(eq=False)
class Weighted(Generic[T]):
    """A plugin in a list where each has a weight: a reward of a stage, an objective of a sum.

    name    what the list calls it: its `use`
    value   the reward or the objective itself
    weight  the factor of its score or loss
    """

    name: str
    value: T
    weight: float = field(default=1.0, validator=_finite)

    @property
    def reward(self) -> T:
        """The value, under the name that it had in version 0.1."""
        return self.value
