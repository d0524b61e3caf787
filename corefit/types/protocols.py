"""What backbones, samplers, noise weightings, rewards and sources are asked for; objectives are in objective.py."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from corefit.types.former import adopt
from corefit.types.values import Condition, Example, Meta, Step

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from corefit.rng import Rng


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

    if not TYPE_CHECKING:  # no member that a class must have to be one

        def __init_subclass__(cls, **keys: Any) -> None:
            super().__init_subclass__(**keys)
            adopt(cls)

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
    def from_saved(self, folder: Path) -> Backbone:
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


@runtime_checkable
class Configured(Protocol):
    """What a Sized Backbone may offer besides, so that its need of memory is computed once and not by every check."""

    def config_key(self) -> str:
        """Hash of all files that `load_blank`, `condition_shapes` and `latent_shape` read."""
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


class Source(Protocol):
    """Raw examples from somewhere; the cache turns them into MDS."""

    @abstractmethod
    def examples(self) -> Iterator[Example]:
        """All examples, in a fixed order."""
        ...
