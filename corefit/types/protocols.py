"""The protocols of backbones, samplers, noise weightings, rewards and sources; that of objectives is in objective.py.

Members that the author of a plugin must write are abstract: a class that derives from a protocol and lacks one cannot
be instantiated. The few others have defaults here, which a class that derives from the protocol inherits. A class that
derives from nothing must have all members. The host refuses a class that lacks one, and names the member.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from corefit.types.former import adopt
from corefit.types.values import Condition, Example, Meta, Step

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from corefit.rng import Rng


class Backbone(Protocol):
    """Loads, calls and saves one model family. It is an attrs class; its fields are the keys of `[backbone]`.

    Nothing is read before `load`; text encoders and VAE are read when they are first used and dropped by `release`.

    `distilled` and `combine` have defaults, which a class that derives from this one inherits. All other methods are
    abstract and must be written, and the three attributes must be declared, usually as attrs fields with init=False.
    """

    transformer: Any
    """The network under training, an nn.Module; the trainer replaces it with its prepared (DDP) form."""
    empty: Condition | None
    """The empty prompt's condition [1, ...], or None while it is unknown. The trainer sets it from the cache, so that
    `null` needs no text encoder."""
    lora_targets: Sequence[str]
    """Names of the modules that a LoRA adapts by default."""

    if not TYPE_CHECKING:  # type checkers would demand it of classes that do not derive from this one

        def __init_subclass__(cls, **keys: Any) -> None:
            super().__init_subclass__(**keys)
            adopt(cls)

    @property
    def distilled(self) -> bool:
        """Whether the network takes the guidance scale as an input; `guided` is then one call without `combine`.

        The default is False.
        """
        return False

    @abstractmethod
    def check(self) -> None:
        """Raise CorefitError if something is wrong with the model's files that shows without reading weights."""
        ...

    @abstractmethod
    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Set the device of text encoders and VAE, and the dtype in which prompts are encoded; read nothing."""
        ...

    @abstractmethod
    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Read the transformer and put it on `device` in `dtype`."""
        ...

    @abstractmethod
    def from_saved(self, folder: Path) -> Backbone:
        """Return the same backbone, not loaded, with the weights that `save` wrote to `folder`."""
        ...

    @abstractmethod
    def weights_key(self) -> str:
        """Return a hash of the transformer's files."""
        ...

    @abstractmethod
    def load_lora(self, folder: Path) -> None:
        """Add the LoRA saved in `folder` to the loaded transformer; only the LoRA is trainable then."""
        ...

    @abstractmethod
    def release(self) -> None:
        """Drop the text encoders and the VAE."""
        ...

    @abstractmethod
    def encoding_key(self) -> Mapping[str, str]:
        """Name everything that the results of `encode_text` and `encode` depend on, each with a short text or a hash.

        The cache of encoded data is keyed by it.
        """
        ...

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts; row i of the condition depends on prompt i alone."""
        ...

    @abstractmethod
    def null(self, n: int) -> Condition:
        """Return the condition of n empty prompts, which guidance and condition dropout use."""
        ...

    @abstractmethod
    def encode(self, media: Tensor) -> Tensor:
        """Encode media [B, 3, H, W] (video [B, 3, T, H, W]) in [0, 1] to x0 [B, ...], float32."""
        ...

    @abstractmethod
    def decode(self, x0: Tensor, checkpoint: bool = False) -> Tensor:
        """Decode x0 [B, ...] to media in [0, 1], float32; the media have a graph where x0 has one.

        checkpoint  recompute in the backward pass, in place of keeping the decoder's activations, which are 3 GiB for
                    a picture of 512 x 512
        """
        ...

    @abstractmethod
    def latent_shape(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of one row's latents for media of `size`.

        Raises ConfigError, a ValueError, for a size that the model does not take.

        size  [height, width] of pictures, [frames, height, width] of clips
        """
        ...

    @abstractmethod
    def velocity(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """Return the predicted velocity v(x, sigma, cond) [B, ...] in float32; sigma [B] is float32."""
        ...

    @abstractmethod
    def guided(self, x: Tensor, sigma: Tensor, cond: Condition, scale: float, v_cond: Tensor | None = None) -> Tensor:
        """Return the velocity [B, ...] under classifier-free guidance: `combine` of those of `cond` and `null`.

        With scale 1 it is `velocity`. Passing v_cond = velocity(x, sigma, cond) saves one of the two calls. A distilled
        network is called once, with the scale.
        """
        ...

    def combine(self, v_cond: Tensor, v_null: Tensor, scale: float) -> Tensor:
        """Combine the two velocities [B, ...] of guidance, each row by itself.

        The default is v_null + scale (v_cond - v_null). Families that differ write their own: Qwen-Image, for one,
        rescales the result to the norm of v_cond. It is differentiable in both, and gives v_cond for scale 1.
        """
        return v_null + scale * (v_cond - v_null)

    @abstractmethod
    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        """Return the checkpoint's own inference grid, [steps + 1], falling from 1 (or near) to 0; float32, CPU."""
        ...

    @abstractmethod
    def shift(self, shape: Sequence[int]) -> float:
        """Return the timestep shift for training noise on latents of `shape`."""
        ...

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write to `folder` what diffusers loads: the whole pipeline, or the LoRA alone if one is trained."""
        ...


class Sampler(Protocol):
    """Takes one step of a rollout. It is an attrs class; its fields are the keys of a `sampler` table.

    `step` is abstract and must be written; `stochastic` and `log_prob` have defaults, which a class that derives from
    this one inherits.
    """

    @property
    def stochastic(self) -> bool:
        """Whether `step` may return std > 0, which policy gradients need. The default is True."""
        return True

    @abstractmethod
    def step(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Step:
        """Return the transition from x at sigma [B] to sigma_next [B] < sigma, given v = velocity at (x, sigma)."""
        ...

    def log_prob(self, x_next: Tensor, step: Step) -> Tensor:
        """Return log p(x_next) [B] under `step`, as a mean (not a sum) over all but the first axis.

        The default is the density of the normal distribution with the mean and std of `step`.
        """
        from corefit.flow import log_prob

        return log_prob(x_next, step.mean, step.std)


class NoiseWeighting(Protocol):
    """Draws the noise levels at which a model is supervised, and weights the loss at each.

    It is an attrs class; its fields are the keys of a `noise` table. Both methods are abstract and must be written.
    """

    @abstractmethod
    def sample(self, n: int, shift: float, rng: Rng) -> Tensor:
        """Draw sigma [n] in (0, 1], already shifted, from `rng` only."""
        ...

    @abstractmethod
    def weight(self, sigma: Tensor) -> Tensor:
        """Return the loss weight [n] at sigma [n]."""
        ...


class Reward(Protocol):
    """Scores media. It is an attrs class; its fields are the keys of a `reward` table.

    `score` is abstract and must be written; all others have defaults, which a class that derives from this one
    inherits.
    """

    differentiable: ClassVar[bool] = False
    """Whether `score` stays in torch, so that its gradient reaches media that have a graph."""
    concurrent: ClassVar[bool] = False
    """Whether `score` may be called in a thread of its own while the model generates: it waits for a service, or
    computes on the CPU outside of torch. Its media are on the CPU there."""
    unit: ClassVar[Literal["", "share"]] = ""
    """"share" where a score is a share from 0 to 1, which reports show as a percentage; "" for every other scale."""

    def check(self) -> None:
        """Raise CorefitError if something shows without scoring: a missing file, package or service.

        `corefit check` and `corefit run` call it before anything else happens. The default finds nothing.
        """

    @abstractmethod
    def score(self, media: Tensor, prompts: Sequence[str], meta: Sequence[Meta]) -> Tensor:
        """Return scores [B] for media [B, 3, H, W], or clips [B, 3, T, H, W], in [0, 1].

        A row's score must not depend on the other rows. Where scoring fails, raise an exception; never return 0.
        """
        ...


@runtime_checkable
class SizedReward(Protocol):
    """What a Reward with a network may implement as well, so that `corefit check` counts its memory.

    A reward that is `Configured` too, and says which files that depends on, does not make every check compute it.
    """

    @abstractmethod
    def load_blank(self) -> Any:
        """Return the network on the meta device, in the dtypes that it is held in, or None if no GPU will hold it.

        Rewards that share a network return the same object. Raises CorefitError for what `score` would refuse.
        """
        ...


@runtime_checkable
class SizedScore(Protocol):
    """What a differentiable SizedReward may offer besides, so that the memory of its score's graph is known as well."""

    @abstractmethod
    def score_blank(self, network: Any, media: Tensor) -> Tensor:
        """Return what `score` returns for media, computed with the network that `load_blank` gave, for any prompts.

        The network's tensors and the media are fake by then: they have shapes and no values.
        """
        ...


@runtime_checkable
class KeyedReward(Protocol):
    """What a Reward may implement as well if its scores depend on more than its keys and its code."""

    @abstractmethod
    def scores_key(self) -> str:
        """Return a hash of what else determines the scores: files of weights, or what a service says that it serves.

        When it changes, stages that learn from the reward are trained again, and what it scored is scored again.
        Raises CorefitError if it cannot be told.
        """
        ...


@runtime_checkable
class Featured(Protocol):
    """What a Reward with an image encoder may implement as well, so that diversity is measured by its features."""

    @abstractmethod
    def features(self, media: Tensor) -> Tensor:
        """Return features [B, D] of media [B, 3, H, W], or clips [B, 3, T, H, W], in [0, 1].

        Their cosine similarities must tell how alike two media are; their lengths do not matter.
        """
        ...


class Source(Protocol):
    """Reads raw examples, which corefit encodes into its cache. It is an attrs class; its fields are keys of `source`.

    `examples` is abstract and must be written.
    """

    @abstractmethod
    def examples(self) -> Iterator[Example]:
        """Yield all examples, always in the same order."""
        ...

    @property
    def left_out(self) -> Mapping[str, int]:
        """What the last call of `examples` left out on purpose, counted by name, such as {"tied pair": 12}."""
        return {}
