"""What a backbone may offer beside what every backbone has: each is a protocol of its own, and is asked for by it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from attrs import frozen

from corefit.types.values import Suggested

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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
    """What a Backbone may offer besides, so that the weights under a LoRA may be held in fewer bits.

    The trainer refuses the key with full training, and `corefit export` reads the weights without it.
    """

    frozen: str | None
    """The format of the weights under a LoRA; None for that of the pipeline's precision. It is part of what determines
    a stage's weights: rollouts, training, evaluation and `corefit sample` all read the network in this format."""


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
