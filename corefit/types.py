"""The vocabulary: what objectives (objective.py), samplers, backbones and the trainer say to each other.

Latents keep their natural layout: images [B, C, H, W], video [B, C, T, H, W], packed tokens [B, L, C].
sigma is in [0, 1]: 1 is pure noise, 0 is clean; x = (1 - sigma) x0 + sigma noise; velocity = noise - x0.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NewType, Protocol, runtime_checkable

from attrs import field, frozen

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from corefit.rng import Rng

    Rows = slice | Sequence[int] | Tensor

Meta = Mapping[str, Any]
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


class Backbone(Protocol):
    """How one model family is called. An attrs class; its fields are the keys of `[backbone]`.

    Nothing is read before `load`; text encoders and VAE are read when first used and dropped by `release`.
    """

    transformer: Any
    """The network under training, an nn.Module; the trainer replaces it with its prepared (DDP) form."""
    empty: Condition | None
    """The empty prompt's condition [1, ...], where it is known; set from the cache, so that `null` needs no encoder."""
    lora_targets: Sequence[str]
    """Module names that a LoRA adapts by default."""

    @property
    def distilled(self) -> bool:
        """Whether the scale of guidance is an input of the network: `guided` is one call then, and has no halves."""
        return False

    @abstractmethod
    def check(self) -> None:
        """CorefitError for what is wrong with the model's files and shows without reading weights."""
        ...

    @abstractmethod
    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Say where text encoders and VAE go, and in which precision prompts are encoded; reads nothing."""
        ...

    @abstractmethod
    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Read the transformer and put it on `device` in `dtype`."""
        ...

    @abstractmethod
    def moved(self, folder: Path) -> Backbone:
        """The same backbone, unloaded, with the weights that `save` wrote to `folder`."""
        ...

    @abstractmethod
    def weights_key(self) -> str:
        """Hash of the transformer's files."""
        ...

    @abstractmethod
    def load_lora(self, folder: Path) -> None:
        """Add the adapter saved in `folder` to the loaded transformer, trainable."""
        ...

    @abstractmethod
    def release(self) -> None:
        """Drop the text encoders and the VAE."""
        ...

    @abstractmethod
    def encoding_key(self) -> Mapping[str, str]:
        """What determines `encode_text` and `encode`, each as a short text or hash: the cache's key."""
        ...

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Condition: ...

    @abstractmethod
    def null(self, n: int) -> Condition:
        """The condition of n empty prompts: what guidance and condition dropout use."""
        ...

    @abstractmethod
    def encode(self, media: Tensor) -> Tensor:
        """Media [B, 3, H, W] (video [B, 3, T, H, W]) in [0, 1] -> x0 [B, ...], float32."""
        ...

    @abstractmethod
    def decode(self, x0: Tensor) -> Tensor:
        """x0 [B, ...] -> media in [0, 1], float32."""
        ...

    @abstractmethod
    def latent_shape(self, size: Sequence[int]) -> tuple[int, ...]:
        """Shape of one row's latents for media of `size`; ConfigError, a ValueError, for sizes it does not take.

        size  [height, width] of pictures, [frames, height, width] of clips
        """
        ...

    @abstractmethod
    def velocity(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """v(x, sigma, cond) [B, ...] in float32; sigma [B] in float32."""
        ...

    @abstractmethod
    def guided(self, x: Tensor, sigma: Tensor, cond: Condition, scale: float, v_cond: Tensor | None = None) -> Tensor:
        """Classifier-free guidance: `combine` of the velocities of `cond` and `null`; scale 1 is `velocity`.

        A known v_cond = velocity(x, sigma, cond) saves one of the two calls. Distilled, one call with the scale.
        """
        ...

    def combine(self, v_cond: Tensor, v_null: Tensor, scale: float) -> Tensor:
        """How guidance joins its halves [B, ...], row by row: v_null + scale (v_cond - v_null), but for some families.

        Qwen-Image, for one, gives the result the norm of v_cond. Differentiable in both; v_cond where scale is 1.
        """
        return v_null + scale * (v_cond - v_null)

    @abstractmethod
    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        """The checkpoint's own inference grid, [steps + 1], falling from 1 (or near) to 0; float32, CPU."""
        ...

    @abstractmethod
    def shift(self, shape: Sequence[int]) -> float:
        """The timestep shift that training noise uses for latents of `shape`."""
        ...

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what diffusers loads: a whole pipeline, or the LoRA alone where one is trained."""
        ...


@runtime_checkable
class Sized(Protocol):
    """What a Backbone may offer besides, so that its need of memory is known before weights are read."""

    def routes(self) -> Sequence[Any]:
        """Once loaded: networks of which each row passes through one; `transformer`, or several alike inside it."""
        ...

    def load_blank(self, dtype: torch.dtype) -> None:
        """What `load` does, on the meta device: shapes without weights. CorefitError for what `load` would refuse."""
        ...

    def condition_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor of a condition, of one row; empty where that is not known."""
        ...


StoredTensors = Mapping[str, Any]
"""Name -> a tensor in a file, of which `stored[name][rows]` reads rows alone, and `stored[name][...]` all."""


@runtime_checkable
class Streamed(Protocol):
    """What a Backbone may offer besides, so that sharded weights are read and saved a tensor at a time.

    Without it every process reads the whole network into main memory before it is sharded, and the first one holds a
    whole copy there while it saves.
    """

    def load_empty(self, dtype: torch.dtype) -> None:
        """What `load` does, with parameters on the meta device and with real buffers."""
        ...

    def stored(self) -> AbstractContextManager[StoredTensors]:
        """The files' tensors, by their names in `transformer.state_dict()`, a LoRA's left out.

        CorefitError where they are not those that `load_empty` has made, in name and shape.
        """
        ...

    def save_tensors(self, folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """What `save` does, of tensors that come one at a time: of the LoRA alone where there is one."""
        ...


class Sampler(Protocol):
    """How one step is taken. An attrs class; its fields are the keys of a `sampler` table."""

    @property
    def stochastic(self) -> bool:
        """Whether `step` may return std > 0: what policy gradients need."""
        return True

    @abstractmethod
    def step(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Step:
        """The transition from sigma [B] to sigma_next [B] < sigma, given v = velocity at (x, sigma)."""
        ...

    def log_prob(self, x_next: Tensor, step: Step) -> Tensor:
        """log p(x_next) [B] under `step`, mean over all but the first axis."""
        from corefit.flow import log_prob

        return log_prob(x_next, step.mean, step.std)


class NoiseWeighting(Protocol):
    """At which noise levels a model is supervised, and how much each counts."""

    @abstractmethod
    def sample(self, n: int, shift: float, rng: Rng) -> Tensor:
        """sigma [n] in (0, 1], already shifted; draws come from `rng` only."""
        ...

    @abstractmethod
    def weight(self, sigma: Tensor) -> Tensor:
        """Loss weight [n] at sigma [n]."""
        ...


class Reward(Protocol):
    """Scores media. An attrs class. Failing is an exception, never a 0."""

    @abstractmethod
    def score(self, media: Tensor, prompts: Sequence[str], meta: Sequence[Meta]) -> Tensor:
        """Rewards [B] for media [B, 3, H, W], or clips [B, 3, T, H, W], in [0, 1].

        A row's score must not depend on its neighbours.
        """
        ...


@frozen(eq=False)
class Stored:
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
    media: Path | Stored | Any | None = None
    meta: Meta = field(factory=dict[str, Any])

    @property
    def prompts(self) -> tuple[str, ...]:
        """All captions, one or more."""
        return (self.prompt,) if isinstance(self.prompt, str) else tuple(self.prompt)


class Source(Protocol):
    """Raw examples from somewhere; the cache turns them into MDS."""

    @abstractmethod
    def examples(self) -> Iterator[Example]:
        """All examples, in a fixed order."""
        ...


def _finite(_: object, __: object, weight: float) -> None:
    if not math.isfinite(weight):
        raise ValueError(f"'weight' must be a number, not {weight}")


@frozen(eq=False)
class Weighted:
    """A reward as a stage lists it: its name, its weight, and itself."""

    name: str
    reward: Reward
    weight: float = field(default=1.0, validator=_finite)


Samples = Callable[[], tuple[Sequence[str], "Tensor"]]
"""Makes prompts and their media."""


@frozen(eq=False)
class TrainState:
    """What observers may read of a running stage.

    step     steps finished
    folder   the stage's own, runs/<name>/01-soar for example; `model/` in it once the stage has finished
    backbone with the weights that the stage would leave now: their average where the stage has `ema`
    sample   makes (prompts, media [n, 3, H, W], or clips, in [0, 1]): the first [eval] prompts, always from the same
             noise; None without [eval], and of sharded weights but for the steps where the stage's own samples are due
    """

    step: int
    folder: Path
    backbone: Backbone
    sample: Samples | None = None
