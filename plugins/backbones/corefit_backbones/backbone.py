"""What all model families of diffusers have in common: how they are read, called with guidance, and saved."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from attrs import define, evolve, field, validators

from corefit import ROUNDING, Condition
from corefit.errors import ModelError
from corefit.types import ModelPath, OriginalTensor, Suggested
from corefit_backbones import context, network, offloading, original_names, parts, schedule, turns, usual
from corefit_backbones.beside import Beside, Codec
from corefit_backbones.decoding import decode_recomputed
from corefit_backbones.folder import LONGEST, Checkpoint
from corefit_backbones.single_file import SingleFile

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@define(eq=False, slots=False)
class Diffusers(ABC):
    """The base of every family. A family names diffusers' classes and says how its transformer is called.

    path                    a folder that the family's pipeline loads, or its name on the hub
    revision                branch, tag or commit on the hub
    variant                 which weight files are read: "fp16" reads model.fp16.safetensors
    gradient_checkpointing  recompute activations in backward: less memory, about a third more time
    attention               backend of diffusers' dispatcher: "native" (torch), "flash", "xformers", ...
    compile                 torch.compile for the repeated blocks: faster steps after a first one that takes a minute
    offload                 "blocks" keeps the frozen weights of the network's blocks in main memory; those of two are
                            on the device at once. It recomputes as gradient_checkpointing does; not for full training
    text_encoders           where prompts are encoded: on the "device", there in "int8", or on the "cpu", which is slow
                            and takes none of the device's memory
    tile                    side in pixels of the tiles in which the VAE encodes and decodes what is larger; they
                            overlap by a quarter. By default media go through the VAE whole
    frozen                  format of the frozen weights under a LoRA: "bf16", "fp8", "int8", "nf4"; by default that of
                            the precision. It is for the linear layers of the blocks, and all else stays as it is
    max_sequence_length     number of T5 tokens that every prompt is padded or cut to

    gradient_checkpointing, attention, compile and offload change speed and rounding only, as does text_encoders except
    for "int8", with which data are encoded anew. If one of them changes, a finished stage is not run again, and an
    interrupted one continues. Every other key except `path` is part of what determines a stage's weights.
    """

    pipeline_class: ClassVar[str]
    suggested: ClassVar[Suggested]
    transformer_class: ClassVar[str]
    vae_class: ClassVar[str]
    codec: ClassVar[Codec]
    timestep_scale: ClassVar[float] = 1000
    """The timestep that the network takes at sigma 1."""
    linear_grid: ClassVar[bool] = False
    """Whether the pipeline passes its scheduler the grid 1, 1 - 1/steps, ..., 1/steps, which the scheduler shifts."""
    lora_names: ClassVar[Callable[[Mapping[str, Any]], Mapping[str, Any]]] = dict
    """Renames a LoRA's weights from diffusers' names to those in the saved file."""
    original_rules: ClassVar[Callable[[int], original_names.Rules]]
    """Gives the names of the original code for a number of layers: a function of the module original_names."""

    path: ModelPath
    revision: str | None = None
    variant: str | None = field(
        default=None, validator=validators.optional(validators.matches_re(r"[\w-]+(\.[\w-]+)*"))
    )
    transformer_: ModelPath | None = field(default=None, kw_only=True)
    """A .safetensors file with the weights of the transformer, in place of those in the folder: as diffusers or as the
    original code names them, such as files for ComfyUI. All other parts and its config.json are those of `path`."""
    gradient_checkpointing: bool = field(default=False, metadata=ROUNDING)
    attention: str = field(default="native", metadata=ROUNDING)
    compile: bool = field(default=False, metadata=ROUNDING)
    offload: Literal["none", "blocks"] = field(default="none", metadata=ROUNDING)
    text_encoders: Literal["device", "cpu", "int8"] = field(default="device", metadata=ROUNDING)
    tile: int | None = field(default=None, validator=validators.optional(validators.ge(64)))
    frozen: Literal["bf16", "fp8", "int8", "nf4"] | None = None
    max_sequence_length: int = field(default=512, validator=[validators.gt(0), validators.le(LONGEST)])

    transformer: Any = field(init=False, default=None)
    lora_targets: Sequence[str] = field(init=False, default=network.ATTENTION)
    empty: Condition | None = field(init=False, default=None)
    """The empty prompt's condition [1, ...]: kept once it was encoded, or set from a cache."""
    _device: Any = field(init=False, default=None)
    _dtype: Any = field(init=False, default=None)
    _others: Beside | None = field(init=False, default=None)
    _grids: dict[tuple[int, int], Any] = field(init=False, factory=dict[tuple[int, int], Any])

    @property
    def distilled(self) -> bool:
        """Whether the guidance scale is an input of the network."""
        return False

    @abstractmethod
    def check_settings(self) -> None:
        """Read every JSON file that `load` and `sigmas` need; ModelError if they do not fit this family."""

    @abstractmethod
    def latent_shape(self, size: Sequence[int]) -> tuple[int, ...]:
        """Shape of one sample's latents for media of `size` in pixels; ConfigError for sizes that do not fit."""

    @abstractmethod
    def condition_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor of one sample's condition."""

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Condition: ...

    @abstractmethod
    def velocity(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """v [B, ...] in float32; the network runs in the dtype given to `load`, and gets sigma in float32."""

    @abstractmethod
    def num_tokens(self, shape: Sequence[int]) -> int:
        """Number of patches of latents of `shape`; dynamic shifting of the noise levels depends on it."""

    @cached_property
    def schedule(self) -> Mapping[str, Any]:
        """The scheduler's config."""
        return schedule.check(self.checkpoint.config("scheduler", "scheduler_config.json"), self.path)

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        """The pipeline's own noise levels [steps + 1] for latents of `shape`, the last 0; float32, CPU."""
        key = steps, self.num_tokens(shape)
        if key not in self._grids:  # diffusers takes as long for it as for a small kernel, in each term of a step
            self._grids[key] = schedule.grid(self.schedule, *key, linear=self.linear_grid)
        return self._grids[key]

    def shift(self, shape: Sequence[int]) -> float:
        """The scheduler's timestep shift; with dynamic shifting, the one for latents of `shape`."""
        return schedule.shift(self.schedule, self.num_tokens(shape))

    def check(self) -> None:
        """Raise a ModelError for settings that do not fit this family, and for parts without weights."""
        self.check_settings()
        network.check_format(self.frozen)
        self._check_class("vae", self.vae_class)
        if self.tile is not None:
            self.codec.check_tile(self.checkpoint.config("vae"), self.tile)
        for name in self.networks:
            self._check_class(name, self.transformer_class)
            config = self.checkpoint.config(name)
            for key in ("num_layers", "num_attention_heads", "attention_head_dim"):
                config.get(key)  # raises now if the value is not a number
        self.checkpoint.check_weights("transformer", "vae", "text_encoder")

    def _check_class(self, part: str, expected: str) -> None:
        """Raise a ModelError if a part has another class than this family's, whose weights may have equal names."""
        config = self.checkpoint.config(part)
        if config.get("_class_name", expected) != expected:
            raise ModelError(f"{config.file}: _class_name is {config['_class_name']}; this family's is {expected}")

    def check_channels(self, latents: int, patch: int = 1) -> None:
        """Raise a ModelError unless the transformer takes the VAE's number of latent channels.

        patch  side of the patches, in latents, that are packed into channels before the transformer
        """
        needed, config = latents * patch**2, self.checkpoint.config("transformer")
        if config["in_channels"] != needed:
            raise ModelError(
                f"{config.file}: the transformer has {config['in_channels']} input channels, and the VAE's latents "
                f"need {needed}; the two are of different models"
            )

    @cached_property
    def checkpoint(self) -> Checkpoint:
        single = SingleFile(Path(self.transformer_), type(self).original_rules) if self.transformer_ else None
        return Checkpoint(self.pipeline_class, self.path, self.revision, self.variant, single)

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Set the device of text encoders and VAE, and the dtype of the text encoders; `load` does this as well."""
        self._device, self._dtype = device, dtype

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Read the transformer in `dtype`; ModelError for a folder or file that cannot be used."""
        self.check_settings()
        kind = parts.of_diffusers(self.transformer_class)
        read = [network.read_as(kind, self.checkpoint, each, dtype, self.frozen, device) for each in self.networks]
        self._set_up(self.joined(read).to(device), device, dtype)

    def load_empty(self, dtype: torch.dtype) -> None:
        """Do what `load` does, with parameters on the meta device and real buffers on the CPU."""
        import torch

        self.check_settings()
        configs = [self.checkpoint.config(name) for name in self.networks]
        empty = [
            network.packing(network.empty(parts.of_diffusers(self.transformer_class), config, dtype), self.frozen)
            for config in configs
        ]
        self._set_up(self.joined(empty), torch.device("cpu"), dtype)

    def _set_up(self, transformer: Any, device: torch.device, dtype: torch.dtype) -> None:
        """Make a new network `self.transformer`, with the attention, checkpointing and compilation configured."""
        self.place(device, dtype)
        self.transformer = transformer
        if self.attention != "native":
            network.set_attention(self.transformer, self.attention)
        if self.gradient_checkpointing or self.offloads:
            self._recompute()
        if self.compile:
            network.compile_blocks(self.transformer)

    def load_blank(self, dtype: torch.dtype) -> None:
        """Do what `load` does on the meta device, which has shapes without weights. Only JSON is read.

        ModelError for options that `load` would refuse. The network keeps torch's own attention, because the other
        backends run on a GPU only.
        """
        import torch

        self.place(torch.device("meta"), dtype)
        if self.attention != "native":
            network.set_attention(self._blank(dtype), self.attention)
        self.transformer = self._blank(dtype)
        if self.transformer_:
            with self.stored():  # which compares the header of its file
                pass
        if self.gradient_checkpointing or self.offloads:
            self._recompute()

    @property
    def offloads(self) -> bool:
        """Whether the frozen weights of the network's blocks wait in main memory while they are not used."""
        return self.offload == "blocks"

    def settle(self, device: torch.device) -> None:
        """Put the loaded network on `device`, except for the frozen weights of its blocks, and let these follow."""
        offloading.apply(self.routes(), device)
        ignored = [self._prefix(name) + each for name, part in self._parts() for each in offloading.waiting(part)]
        self.transformer._ddp_params_and_buffers_to_ignore = ignored
        self.place(device, self._dtype)

    def resident_bytes(self) -> int:
        """The most bytes of the network's weights that are on the device at once after `settle`."""
        return offloading.resident_bytes(self.routes())

    def load_blank_decoder(self) -> Any:
        """Make a VAE without weights, on the meta device, with which `decode` works on fake tensors."""
        return self._beside().blank_vae()

    def routes(self) -> Sequence[Any]:
        """The loaded networks; each sample passes through exactly one of them."""
        return [part for _, part in self._parts()]

    def check_context(self, number: int, sizes: Iterable[Sequence[int]]) -> None:
        """Raise ConfigError unless `number` processes can share each sample of these sizes, in pixels."""
        context.check(self, parts.of_diffusers(self.transformer_class), number, sizes)

    def split_context(self, number: int, device: torch.device) -> None:
        """Let the loaded networks compute each sample on `number` processes, a part of its sequence on each."""
        for part in self.routes():
            context.split(part, number, device)

    def usual(self) -> Suggested:
        """What the family suggests, with the size that the checkpoint was made for."""
        return evolve(self.suggested, size=usual.size(self.checkpoint, self.suggested.size))

    def config_key(self) -> str:
        """Hash of whatever is read before the weights."""
        return self.checkpoint.config_key()

    def _blank(self, dtype: torch.dtype) -> Any:
        kind = parts.of_diffusers(self.transformer_class)
        configs = [self.checkpoint.config(name) for name in self.networks]
        return self.joined([network.packing(network.blank(kind, config, dtype), self.frozen) for config in configs])

    def _recompute(self) -> None:
        for _, part in self._parts():
            network.recompute(part)

    def joined(self, networks: Sequence[Any]) -> Any:
        """Join the networks under training into one module; here for a family that has one network."""
        (only,) = networks
        return only

    @property
    def networks(self) -> Sequence[str]:
        """Folders of the networks under training; if several, these are also their names inside `transformer`."""
        return [name for name in self.checkpoint.parts if name.startswith("transformer")]

    def from_saved(self, folder: Path) -> Self:
        """The same backbone, not loaded, for the whole pipeline that `save` wrote to `folder`."""
        return evolve(self, path=ModelPath(str(folder)), revision=None, variant=None, transformer_=None)

    moved = from_saved
    """The name of `from_saved` in version 0.1."""

    def weights_key(self) -> str:
        """sha256 of the files of the networks under training."""
        return "+".join(self.checkpoint.key(name) for name in self.networks)

    def load_lora(self, folder: Path) -> None:
        """Add the LoRA that `save` wrote to the loaded transformer: trainable, in float32, all else frozen."""
        for name, part in self._parts():
            network.load_lora(parts.of_diffusers(self.pipeline_class), part, folder, network.lora_file(name))

    def release(self) -> None:
        """Free the text encoders and the VAE. `null` needs neither if `empty` is set."""
        import torch

        if self._others is not None:
            self._others = None
            gc.collect()  # diffusers' pipelines and their parts refer to each other, and gigabytes would stay
        torch.cuda.empty_cache()

    def encoding_key(self) -> Mapping[str, str]:
        """What determines the results of `encode` ("vae") and `encode_text` ("text..."), mostly hashes of files.

        `place` or `load` must be called first, because the dtype is part of it.
        """
        assert self._dtype is not None, "place or load first: the dtype is part of the key"
        kinds = ("vae", "text_encoder", "tokenizer")
        parts = [name for name in self.checkpoint.parts if name.startswith(kinds)]
        key = {name.replace("tokenizer", "text_tokenizer"): self.checkpoint.key(name) for name in parts}
        changed = {"text_bits": "int8"} if self.text_encoders == "int8" else {}
        changed |= {"vae_tile": str(self.tile)} if self.tile else {}
        return {**key, "text_dtype": str(self._dtype), "text_length": str(self.max_sequence_length), **changed}

    def encode(self, media: Tensor) -> Tensor:
        """Media [B, 3, H, W] or clips [B, 3, T, H, W] in [0, 1] -> x0 [B, ...]: the mode of the latents, float32."""
        self.latent_shape(media.shape[2:])
        return self.codec.encode(self.vae(), media)

    def decode(self, x0: Tensor, checkpoint: bool = False) -> Tensor:
        """x0 [B, ...] -> media in [0, 1], float32; differentiable in x0.

        checkpoint  recompute in the backward pass, one row at a time, in place of keeping the activations
        """
        if checkpoint:
            return decode_recomputed(self.codec.decode, self.vae(), x0)
        return self.codec.decode(self.vae(), x0)

    def predict(self, x: Tensor, sigma: Tensor, cond: Condition, **inputs: Tensor | None) -> Tensor:
        """The transformer's output for x [B, ...] and sigma [B], float32, in the shape of x.

        inputs  what this family's transformer takes besides latents, time and text
        """
        v = self.transformer(
            hidden_states=x.to(self._dtype),
            timestep=self.timestep_scale * sigma.float(),
            encoder_hidden_states=cond.tensors["prompt_embeds"].to(self._dtype),
            return_dict=False,
            **inputs,
        )[0].float()
        assert v.shape == x.shape, f"latents {tuple(x.shape)} were cropped to {tuple(v.shape)}: see latent_shape"
        return v

    def null(self, n: int) -> Condition:
        """The empty prompt's condition [n, ...]; the n rows share memory."""
        empty = self.empty = (self.encode_text([""]) if self.empty is None else self.empty).to(self._device)
        return Condition({name: t.expand(n, *t.shape[1:]) for name, t in empty.tensors.items()})

    def guided(self, x: Tensor, sigma: Tensor, cond: Condition, scale: float, v_cond: Tensor | None = None) -> Tensor:
        """Classifier-free guidance: `combine` applied to the velocities of the prompt and the empty prompt, [B, ...].

        This is one call of the network with 2B rows, or with B rows if v_cond is given. At a scale of 1 the empty
        prompt is not needed.
        """
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
        """A context with the tensors in the weight files of the networks under training, by name in `transformer`."""
        with ExitStack() as opened:
            found: dict[str, Any] = {}
            for name, part in self._parts():
                tensors = opened.enter_context(network.stored(self.checkpoint, name, part))
                held = network.packed(part, tensors, self._dtype)
                found |= {self._prefix(name) + each: tensor for each, tensor in held.items()}
            yield found

    def save(self, folder: Path) -> None:
        """Write only the LoRA if there is one, otherwise a whole pipeline, its file names without the variant.

        `from_saved(folder)` reads the pipeline back, and `load_lora(folder)` the LoRA. Parts that were not trained are
        hard links to the source.
        """
        self.save_tensors(folder, network.unwrapped(self.transformer).state_dict().items())

    def save_tensors(self, folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Do what `save` does with an iterable of tensors, in the order of `transformer.state_dict()`."""
        adapted, networks = network.has_lora(network.unwrapped(self.transformer)), dict(self._parts())
        for name, group in groupby(tensors, self._owner):
            own = ((each.removeprefix(self._prefix(name)), tensor) for each, tensor in group)
            if adapted:
                kept = {each: tensor for each, tensor in own if ".lora_" in each}
                kind = parts.of_diffusers(self.pipeline_class)
                network.save_lora(kind, networks[name], kept, folder, network.lora_file(name), self.lora_names)
            else:
                network.save_weights(folder / name, own)
        if not adapted:
            self.checkpoint.link_others(folder, self.networks)

    def original(self) -> Mapping[str, Mapping[str, OriginalTensor]]:
        """Say of what each original tensor is made: for one network, or for two, that for noisy levels first."""
        found: dict[str, Mapping[str, OriginalTensor]] = {}
        files = ("high_noise", "low_noise") if len(self.networks) > 1 else ("",)
        for file, (name, part) in zip(files, self._parts(), strict=True):
            rules = type(self).original_rules(self.checkpoint.config(name)["num_layers"])
            found[file] = original_names.arranged(part.state_dict(), rules, self._prefix(name))
        return found

    def original_lora(self, module: str) -> str:
        """The name of diffusers after "transformer.", which ComfyUI knows for SD3 and FLUX."""
        return f"transformer.{module}"

    def _owner(self, named: tuple[str, Tensor]) -> str:
        """Folder of the network that a (name, tensor) of `transformer` belongs to."""
        return named[0].partition(".")[0] if len(self.networks) > 1 else self.networks[0]

    def _prefix(self, name: str) -> str:
        """Prefix of one network's tensors in `transformer.state_dict()`."""
        return f"{name}." if len(self.networks) > 1 else ""

    def _parts(self) -> list[tuple[str, Any]]:
        """(folder, network) for each network under training."""
        transformer, names = network.unwrapped(self.transformer), self.networks
        return [(name, getattr(transformer, name) if len(names) > 1 else transformer) for name in names]

    def text(self) -> Any:
        """The family's diffusers pipeline with only tokenizers and frozen text encoders, read on first use."""
        return self._beside().text()

    def vae(self) -> Any:
        """The VAE in float32, frozen, read on first use, on the device."""
        return self._beside().vae()

    @property
    def text_device(self) -> torch.device:
        """Where prompts are encoded."""
        return self._beside().text_device

    def encoder_bytes(self) -> Mapping[str, int]:
        """The bytes of each text encoder and of the VAE on the device, in the dtype given to `place`."""
        return self._beside().bytes()

    def encoding_bytes(self, memory: float) -> int:
        """The most of `encoder_bytes` that are at once on a device of so many bytes."""
        return turns.most(self.encoder_bytes(), memory)

    def _beside(self) -> Beside:
        assert self._device is not None, "place or load first"
        where = self._device, self._dtype
        if self._others is None or (self._others.device, self._others.dtype) != where:
            names = self.pipeline_class, self.vae_class
            self._others = Beside(self.checkpoint, *names, *where, self.codec, self.text_encoders, self.tile)
        return self._others
