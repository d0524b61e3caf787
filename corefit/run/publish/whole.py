"""The whole weights of a stage, one tensor at a time: what it trained, or what its LoRA makes of what it goes on."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from attrs import frozen

from corefit.errors import ConfigError
from corefit.run.publish.output import Output
from corefit.train import weights
from corefit.types import Backbone, StoredTensors, Streamed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""The names of --dtype, and torch's."""


def read_empty(backbone: Backbone, dtype: torch.dtype) -> Backbone:
    """Make the backbone's network without reading weights, and return the backbone; one that cannot reads them all."""
    import torch

    if isinstance(backbone, Streamed):
        backbone.load_empty(dtype)
    else:
        backbone.load(torch.device("cpu"), torch.float32)
    return backbone


@contextmanager
def stored(backbone: Backbone) -> Generator[StoredTensors]:
    """Open the weights of a backbone that `read_empty` has returned."""
    if isinstance(backbone, Streamed):
        with backbone.stored() as tensors:
            yield tensors
    else:
        yield {name: tensor.detach() for name, tensor in backbone.transformer.state_dict().items()}


@frozen(eq=False)
class Whole:
    """The whole weights of a stage; `whole[name]` reads one tensor.

    backbone  its network, without a LoRA; a Streamed backbone's has no weights
    empty     the tensors of that network
    before    the weights that the stage's LoRA goes on, or its own if it has none
    layers    the layers of the LoRA, by the name of the weight that each changes
    dtype     the dtype asked for, None for that of `before`
    """

    backbone: Backbone
    empty: Mapping[str, Tensor]
    before: StoredTensors
    layers: Mapping[str, Any]
    dtype: torch.dtype | None

    @staticmethod
    @contextmanager
    def opened(output: Output, dtype: torch.dtype | None = None) -> Generator[Whole]:
        """Open the weights of a stage."""
        import torch

        backbone = read_empty(output.backbone(), dtype or torch.float32)
        layers = adapted_layers(adapted(output)) if output.lora else {}
        with stored(backbone) as before:
            yield Whole(backbone, backbone.transformer.state_dict(), before, layers, dtype)

    @property
    def names(self) -> list[str]:
        """The tensors' names, in the order of `transformer.state_dict()`."""
        return list(self.empty)

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor; where the LoRA changes it, in float32."""
        tensor: Tensor = self.before[name][...]
        layer = self.layers.get(name)
        return tensor if layer is None else tensor.float() + layer.get_delta_weight("default").detach()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self[name]) for name in self.names)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.empty[name].shape)

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor is exported in: as asked, unless the network wants it in float32 always."""
        own = self.before[name][tuple(slice(1) for _ in self.shape(name)) or ...].dtype  # reads one number
        if self.dtype is None or not own.is_floating_point:
            return own
        return self.empty[name].dtype if isinstance(self.backbone, Streamed) else self.dtype

    @property
    def rounds(self) -> bool:
        """Whether an export changes numbers: it casts, or adds a LoRA to what is stored."""
        return self.dtype is not None or bool(self.layers)

    def rounded(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor in the dtype that it is exported in. Raises ConfigError for numbers that it cannot hold."""
        dtype = self.dtype_of(name)
        cast = tensor.to(dtype)
        if not cast.isfinite().all() and tensor.isfinite().all():
            raise ConfigError(
                f"--dtype: {name} has numbers up to {tensor.abs().max():.3g}, which {dtype} cannot hold; choose bf16"
            )
        return cast


def adapted(output: Output) -> Backbone:
    """Return the backbone with the stage's LoRA on it; a Streamed one has no other weights."""
    import torch

    assert output.lora, "the stage trained all weights"
    backbone = read_empty(output.backbone(), torch.float32)
    backbone.load_lora(output.lora)
    return backbone


def adapted_layers(backbone: Backbone) -> dict[str, Any]:
    """Return the layers of a backbone's LoRA, by the name of the weight that each changes."""
    modules = modules_of(backbone).items()
    return {f"{name}.weight": module for name, module in modules if hasattr(module, "get_delta_weight")}


def modules_of(backbone: Backbone) -> dict[str, Any]:
    """Return the network's modules by name."""
    return dict(backbone.transformer.named_modules())


@contextmanager
def of_base(output: Output, whole: Whole) -> Generator[StoredTensors]:
    """Open the weights of the pipeline's base, from which the first stage started."""
    import torch

    if output.whole is None:
        yield whole.before
        return
    with stored(read_empty(output.base(), torch.float32)) as tensors:
        yield tensors


def torch_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype that --dtype names."""
    import torch

    return getattr(torch, DTYPES[name]) if name else None


def lora_names(backbone: Backbone) -> list[str]:
    """Return the names of the tensors of a backbone's LoRA."""
    return [name for name in backbone.transformer.state_dict() if weights.is_adapter(name)]
