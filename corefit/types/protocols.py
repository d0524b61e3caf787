"""The protocols of backbones, samplers, noise weightings, rewards and sources; that of objectives is in objective.py.

Members that the author of a plugin must write are abstract: a class that derives from a protocol and lacks one cannot
be instantiated. The few others have defaults here, which a class that derives from the protocol inherits. A class that
derives from nothing must have all members. The host refuses a class that lacks one, and names the member.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from attrs import frozen

from corefit.types.former import adopt
from corefit.types.values import Condition, Example, Meta, Step, Suggested

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


@runtime_checkable
class Sized(Protocol):
    """What a Backbone may implement as well, so that the memory it needs is known before weights are read.

    All methods must be written. A backbone without them is not refused; its memory is not estimated.
    """

    @abstractmethod
    def routes(self) -> Sequence[Any]:
        """Return the networks of equal size of which each row passes through exactly one, once loaded.

        That is `transformer` itself, or the experts inside it.
        """
        ...

    @abstractmethod
    def load_blank(self, dtype: torch.dtype) -> None:
        """Do what `load` does, on the meta device: shapes without weights.

        Raises CorefitError for what `load` would refuse.
        """
        ...

    @abstractmethod
    def condition_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of one row of each tensor of a condition; empty if they are not known."""
        ...


@runtime_checkable
class Configured(Protocol):
    """What a Sized Backbone, or a SizedReward, may offer besides, so that its memory is not computed by every check."""

    def config_key(self) -> str:
        """Hash of all files that `load_blank`, `condition_shapes` and `latent_shape` read."""
        ...


@runtime_checkable
class SizedDecoder(Protocol):
    """What a Sized Backbone may offer besides, so that the memory for gradients of rewards is known as well."""

    def load_blank_decoder(self) -> Any:
        """Let `decode` work after `load_blank`, and return the network that it calls: shapes without weights."""
        ...


@runtime_checkable
class Offloading(Protocol):
    """What a Backbone may implement as well whose frozen weights can wait in main memory while they are not used.

    All members must be written. The trainer reads the weights to the CPU, adds adapters there and calls `settle`, where
    `offloads` is true. It refuses full training and sharded weights then.
    """

    @property
    @abstractmethod
    def offloads(self) -> bool:
        """Whether the backbone's keys ask for it."""
        ...

    @abstractmethod
    def settle(self, device: torch.device) -> None:
        """Put the loaded network on `device`, except for the weights that wait; each of those comes when it is used.

        Weights that train, such as a LoRA's, stay on the device.
        """
        ...

    @abstractmethod
    def resident_bytes(self) -> int:
        """Return the most bytes of the network's weights that are on the device at once after `settle`.

        It is called for a network that `load` or `load_blank` has made, with its adapters.
        """
        ...


@runtime_checkable
class SizedText(Protocol):
    """What a Sized Backbone may offer besides, so that the memory for encoding prompts and media is known as well."""

    @abstractmethod
    def encoder_bytes(self) -> Mapping[str, int]:
        """Return the bytes that the weights of each text encoder, and of the "vae", take on the device, by name.

        Only files of settings are read. What encodes on the CPU takes 0 bytes.
        """
        ...

    @abstractmethod
    def encoding_bytes(self, memory: float) -> int:
        """Return the most bytes of `encoder_bytes` that are at once on a device of so many bytes of memory.

        Where all of them together would take too much of it, they take turns.
        """
        ...


@runtime_checkable
class Preset(Protocol):
    """What a Backbone may offer besides: how its family is found and usually sampled.

    `corefit sample` needs no pipeline for its folders then, and `corefit new pipeline --from-folder` no model.
    """

    pipeline_class: ClassVar[str]
    """The class of diffusers that the family's model_index.json names, by which the family is found."""
    suggested: ClassVar[Suggested]
    """A model of the family on the hub, and the settings in which such models are usually sampled."""

    def usual(self) -> Suggested:
        """Return `suggested`, with the size that this model's own files name."""
        ...


@runtime_checkable
class Quantizable(Protocol):
    """A Backbone with a key by which weights under a LoRA are in fewer bits; `corefit export` reads them without it."""

    frozen: str | None
    """The format, None for that of the precision: whatever reads the network of a run reads it in this format."""


StoredTensors = Mapping[str, Any]
"""Maps names to tensors in files: `stored[name][rows]` reads only these rows, `stored[name][...]` the whole tensor."""


@runtime_checkable
class Streamed(Protocol):
    """What a Backbone may implement as well, so that sharded weights are read and saved one tensor at a time.

    All methods must be written. Without them every process reads the whole network into main memory before it is
    sharded, and rank 0 holds a whole copy there while it saves.
    """

    @abstractmethod
    def load_empty(self, dtype: torch.dtype) -> None:
        """Do what `load` does, but leave parameters on the meta device; buffers are real."""
        ...

    @abstractmethod
    def stored(self) -> AbstractContextManager[StoredTensors]:
        """Open the tensors of the checkpoint's files, by their names in `transformer.state_dict()`, without a LoRA's.

        Raises CorefitError if their names or shapes are not those of the network that `load_empty` made.
        """
        ...

    @abstractmethod
    def save_tensors(self, folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Do what `save` does with tensors that arrive one at a time; if there is a LoRA, they are its tensors only."""
        ...


@runtime_checkable
class ContextParallel(Protocol):
    """What a Backbone may implement as well, so that several processes compute a sample together (context_parallel).

    Both methods must be written. Without them the key is refused.
    """

    @abstractmethod
    def check_context(self, number: int, sizes: Iterable[Sequence[int]]) -> None:
        """Raise ConfigError unless `number` processes can share each sample of these sizes, in pixels."""
        ...

    @abstractmethod
    def split_context(self, number: int, device: torch.device) -> None:
        """Let the loaded network compute a part of each sample on each of `number` processes, which follow each other.

        It is called on all processes, which are a multiple of `number`, before the network is wrapped. The processes
        that share a sample call the network with equal inputs and get equal results, whole. Of a weight's gradient
        each has a part, which add up to the whole; of the input's gradient each has the whole.
        """
        ...


@frozen
class OriginalTensor:
    """How a tensor of a model's original code is made of those in `transformer.state_dict()`."""

    parts: tuple[str, ...]
    """The tensors whose rows follow each other in it, by name."""
    swapped: bool = False
    """Whether the two halves of the rows change places: (shift, scale) there, (scale, shift) in diffusers."""


@runtime_checkable
class Original(Protocol):
    """What a Streamed Backbone may implement as well, so that `corefit export --format comfyui` can write its weights.

    Both methods are called after `load_empty`. Without them, models are exported in diffusers' layout only.
    """

    @abstractmethod
    def original(self) -> Mapping[str, Mapping[str, OriginalTensor]]:
        """Return, for each file, what it holds: tensors by their names in the model's original code.

        A model of one network has one file, whose name is "". All files together must hold every tensor once. Raises
        CorefitError for a tensor that has no name there.
        """
        ...

    @abstractmethod
    def original_lora(self, module: str) -> str:
        """Return the name by which ComfyUI finds a LoRA on the module that is called `module` in `transformer`.

        The file has the weights under that name and ".lora_A.weight" and ".lora_B.weight".
        """
        ...


@runtime_checkable
class Specified(Protocol):
    """What a Backbone may implement as well, so that the files of its LoRAs say which model they are for."""

    @abstractmethod
    def model_spec(self) -> Mapping[str, str]:
        """Return what programs that list and load models call this one, by the keys that they read in a file's header.

        "modelspec.architecture"    the model's identifier in Stability AI's ModelSpec, such as "Flux.1-dev"
        "modelspec.implementation"  whose names of weights the file of a LoRA has, such as "diffusers"
        "ss_base_model_version"     the model's name in kohya's tools, such as "flux1"

        A key may be missing.
        """
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
