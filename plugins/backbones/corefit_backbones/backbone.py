"""What the backbones of diffusers' families share: their files, their lazily read parts, guidance, saving."""

from __future__ import annotations

import gc
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from attrs import define, evolve, field, validators

from corefit import ROUNDING, Condition
from corefit.errors import ModelError
from corefit.types import ModelPath
from corefit_backbones import encoders, network, parts, schedule
from corefit_backbones.folder import Checkpoint, fingerprint, link

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@define(eq=False, slots=False)
class Diffusers(ABC):
    """One family: a leaf names diffusers' classes and says how its transformer, text and latents are called.

    path                    a folder that the family's pipeline loads, or its name on the hub
    revision                branch, tag or commit on the hub
    variant                 of the weight files: "fp16" reads model.fp16.safetensors
    gradient_checkpointing  recompute activations in backward: less memory, about a third more time
    attention               backend of diffusers' dispatcher: "native" (torch), "flash", "xformers", ...
    compile                 torch.compile for the repeated blocks: faster steps after a first one that takes a minute

    The last three change how fast and not what is computed, but for rounding: changed, a stage that is finished stays
    so, and one that was interrupted goes on. Every other key but `path` determines the weights that stages leave.
    """

    pipeline_class: ClassVar[str]
    transformer_class: ClassVar[str]
    vae_class: ClassVar[str]
    lora_names: ClassVar[Callable[[Mapping[str, Any]], Mapping[str, Any]]] = dict
    """A LoRA's weights by diffusers' names -> by those that they are saved under."""

    path: ModelPath
    revision: str | None = None
    variant: str | None = field(
        default=None, validator=validators.optional(validators.matches_re(r"[\w-]+(\.[\w-]+)*"))
    )
    gradient_checkpointing: bool = field(default=False, metadata=ROUNDING)
    attention: str = field(default="native", metadata=ROUNDING)
    compile: bool = field(default=False, metadata=ROUNDING)

    transformer: Any = field(init=False, default=None)
    empty: Condition | None = field(init=False, default=None)
    """The empty prompt's condition, one row: kept once made, or set from a cache."""
    _device: Any = field(init=False, default=None)
    _dtype: Any = field(init=False, default=None)
    _text: Any = field(init=False, default=None)
    _vae: Any = field(init=False, default=None)

    @property
    def distilled(self) -> bool:
        """Whether guidance is an input of the network."""
        return False

    @cached_property
    def schedule(self) -> Mapping[str, Any]:
        """The scheduler's config."""
        return schedule.check(self.checkpoint.config("scheduler", "scheduler_config.json"), self.path)

    @abstractmethod
    def check_settings(self) -> None:
        """Read every JSON file that `load` and `sigmas` need; ModelError if they do not fit this family."""

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Condition: ...

    @abstractmethod
    def velocity(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor: ...

    def check(self) -> None:
        """ModelError for settings that do not fit this family, and for parts without weights."""
        self.check_settings()
        self._check_class("vae", self.vae_class)
        for name in self.networks:
            self._check_class(name, self.transformer_class)
            config = self.checkpoint.config(name)
            for key in ("num_layers", "num_attention_heads", "attention_head_dim"):
                config.get(key)  # a number that is none is told now
        self.checkpoint.check_weights("transformer", "vae", "text_encoder")

    def _check_class(self, part: str, expected: str) -> None:
        """ModelError where a part is of another class than this family's: its weights may have the same names."""
        config = self.checkpoint.config(part)
        if config.get("_class_name", expected) != expected:
            raise ModelError(f"{config.file}: _class_name is {config['_class_name']}; this family's is {expected}")

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.pipeline_class, self.path, self.revision, self.variant)

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Where text encoders and VAE will go, and the precision of the former; `load` says so as well."""
        self._device, self._dtype = device, dtype

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Read the transformer, cast to `dtype`; ModelError for a folder or file that cannot be used."""
        self.check_settings()
        self._set_up(self.joined([self._read(name, dtype) for name in self.networks]).to(device), device, dtype)

    def load_empty(self, dtype: torch.dtype) -> None:
        """What `load` does, with parameters on the meta device and real buffers on the CPU."""
        import torch

        self.check_settings()
        configs = [self.checkpoint.config(name) for name in self.networks]
        empty = [network.empty(_class(self.transformer_class), config, dtype) for config in configs]
        self._set_up(self.joined(empty), torch.device("cpu"), dtype)

    def _set_up(self, transformer: Any, device: torch.device, dtype: torch.dtype) -> None:
        """Take a network that was just made as `transformer`, with what the keys ask of it."""
        self.place(device, dtype)
        self.transformer = transformer
        if self.attention != "native":
            network.set_attention(self.transformer, self.attention)
        if self.gradient_checkpointing:
            self._recompute()
        if self.compile:
            network.compile_blocks(self.transformer)

    def load_blank(self, dtype: torch.dtype) -> None:
        """What `load` does, on the meta device: shapes without weights. Only JSON is read.

        ModelError for options that `load` would refuse. Attention stays torch's own: others run on a GPU alone.
        """
        import torch

        self.place(torch.device("meta"), dtype)
        if self.attention != "native":
            network.set_attention(self._blank(dtype), self.attention)
        self.transformer = self._blank(dtype)
        if self.gradient_checkpointing:
            self._recompute()

    def routes(self) -> Sequence[Any]:
        """Once loaded, the networks of which each row passes through one."""
        return [part for _, part in self._parts()]

    def condition_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor of a condition, of one row; empty where a family does not say."""
        return {}

    def config_key(self) -> str:
        """Hash of all config files: whatever is read before the weights is in them."""
        return self.checkpoint.config_key()

    def _blank(self, dtype: torch.dtype) -> Any:
        import torch

        kind, usual = _class(self.transformer_class), torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                return self.joined([self._described(kind, name) for name in self.networks])
        finally:
            torch.set_default_dtype(usual)

    def _described(self, kind: Any, name: str) -> Any:
        config = self.checkpoint.config(name)
        with parts.described(kind, config.file):
            return kind.from_config(dict(config))

    def _recompute(self) -> None:
        for _, part in self._parts():
            network.recompute(part)

    def joined(self, networks: Sequence[Any]) -> Any:
        """The networks under training as one module."""
        (network,) = networks
        return network

    def _read(self, name: str, dtype: torch.dtype) -> Any:
        return network.read(_class(self.transformer_class), self.checkpoint, name, dtype)

    @property
    def networks(self) -> Sequence[str]:
        """Folders of the networks under training; of several, each is a child of `transformer` by that name."""
        return [name for name in self.checkpoint.parts if name.startswith("transformer")]

    def from_saved(self, folder: Path) -> Self:
        """The same backbone, unloaded, on the whole pipeline that `save` wrote to `folder`."""
        return evolve(self, path=ModelPath(str(folder)), revision=None, variant=None)

    moved = from_saved
    """The name that it had in version 0.1."""

    def weights_key(self) -> str:
        """sha256 of the files of the networks under training."""
        return "+".join(fingerprint(self.checkpoint.folder / name) for name in self.networks)

    def load_lora(self, folder: Path) -> None:
        """Add what `save` wrote for a LoRA to the loaded transformer: trainable, float32, the rest frozen."""
        for name, part in self._parts():
            network.load_lora(_class(self.pipeline_class), part, folder, network.lora_file(name))

    def release(self) -> None:
        """Drop the text encoders and the VAE; `null` needs neither once `empty` is known."""
        import torch

        self._text = self._vae = None
        torch.cuda.empty_cache()

    def encoding_key(self) -> Mapping[str, str]:
        """Hashes of the files behind `encode` ("vae") and `encode_text` ("text..."); after `place` or `load`."""
        assert self._dtype is not None, "place or load first: the dtype is part of the key"
        folder, kinds = self.checkpoint.folder, ("vae", "text_encoder", "tokenizer")
        parts = [name for name in self.checkpoint.parts if name.startswith(kinds)]
        key = {name.replace("tokenizer", "text_tokenizer"): fingerprint(folder / name) for name in parts}
        return {**key, "text_dtype": str(self._dtype)}

    def null(self, n: int) -> Condition:
        """The empty prompt's condition, n rows that share memory."""
        empty = self.empty = (self.encode_text([""]) if self.empty is None else self.empty).to(self._device)
        return Condition({name: t.expand(n, *t.shape[1:]) for name, t in empty.tensors.items()})

    def guided(self, x: Tensor, sigma: Tensor, cond: Condition, scale: float, v_cond: Tensor | None = None) -> Tensor:
        """`combine` of both velocities [B, ...]: one call of 2B rows, or of B where v_cond is known or scale is 1."""
        import torch

        if scale == 1:
            return self.velocity(x, sigma, cond) if v_cond is None else v_cond
        null = self.null(len(x))
        if v_cond is None:
            both = self.velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), Condition.cat([cond, null]))
            v_cond, v_null = both.chunk(2)
        else:
            v_null = self.velocity(x, sigma, null)
        return self.combine(v_cond, v_null, scale)

    def combine(self, v_cond: Tensor, v_null: Tensor, scale: float) -> Tensor:
        """v_null + scale (v_cond - v_null) [B, ...]."""
        return v_null + scale * (v_cond - v_null)

    @contextmanager
    def stored(self) -> Generator[Mapping[str, Any]]:
        """The tensors in the files of the networks under training, by their names in `transformer`."""
        with ExitStack() as opened:
            found: dict[str, Any] = {}
            for name, part in self._parts():
                tensors = opened.enter_context(network.stored(self.checkpoint, name))
                network.check_stored(part, tensors, self.checkpoint.folder / name)
                found |= {self._prefix(name) + each: tensor for each, tensor in tensors.items()}
            yield found

    def save(self, folder: Path) -> None:
        """Write the LoRA alone where there is one, otherwise a whole pipeline under plain file names.

        `moved(folder)` reads the pipeline back, `load_lora(folder)` the LoRA. Untouched parts are hard links.
        """
        self.save_tensors(folder, network.unwrapped(self.transformer).state_dict().items())

    def save_tensors(self, folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """What `save` does, of tensors that come one at a time in the order of `transformer.state_dict()`."""
        adapted, parts = network.has_lora(network.unwrapped(self.transformer)), dict(self._parts())
        for name, group in groupby(tensors, self._owner):
            own = ((each.removeprefix(self._prefix(name)), tensor) for each, tensor in group)
            if adapted:
                kept = {each: tensor for each, tensor in own if ".lora_" in each}
                kind = _class(self.pipeline_class)
                network.save_lora(kind, parts[name], kept, folder, network.lora_file(name), self.lora_names)
            else:
                network.save_weights(folder / name, own)
        if not adapted:
            self._link_others(folder)

    def _link_others(self, folder: Path) -> None:
        """Put everything that has not been trained into `folder`."""
        source = self.checkpoint
        others = [name for name in source.parts if name not in self.networks]
        for name in ("model_index.json", *(f"{name}/config.json" for name in self.networks), *others):
            link(source.folder / name, folder / name, self.variant)

    def _owner(self, named: tuple[str, Tensor]) -> str:
        """The network, of those under training, that a tensor of `transformer` belongs to."""
        return named[0].partition(".")[0] if len(self.networks) > 1 else self.networks[0]

    def _prefix(self, name: str) -> str:
        """What `transformer` puts before the names of one network's tensors."""
        return f"{name}." if len(self.networks) > 1 else ""

    def _parts(self) -> list[tuple[str, Any]]:
        """(folder, network) of each under training."""
        transformer, names = network.unwrapped(self.transformer), self.networks
        return [(name, getattr(transformer, name) if len(names) > 1 else transformer) for name in names]

    def text(self) -> Any:
        """The family's diffusers pipeline with tokenizers and frozen text encoders, read on first use."""
        assert self._device is not None, "place or load first"
        if self._text is None:
            self._text = encoders.read(_class(self.pipeline_class), self.checkpoint, self._dtype)
            for name, part in self._text.components.items():
                if name.startswith("text_encoder") and part is not None:
                    part.to(self._device).requires_grad_(False)
        return self._text

    def vae(self) -> Any:
        """The VAE in float32, frozen, read on first use."""
        import torch

        assert self._device is not None, "place or load first"
        if self._vae is None:
            vae = network.read(_class(self.vae_class), self.checkpoint, "vae", torch.float32)
            self._vae = vae.to(self._device).requires_grad_(False)
        return self._vae


def _class(name: str) -> Any:
    """A class of diffusers. What the first import makes is not searched for garbage, neither then nor later.

    That would be a fifth of the time to the first step: there are half a million objects, and nearly all of them stay.
    """
    first = "diffusers" not in sys.modules and gc.isenabled()
    if first:
        gc.collect()
        gc.disable()
    try:
        import diffusers

        return getattr(diffusers, name)
    finally:
        if first:
            gc.freeze()
            gc.enable()
