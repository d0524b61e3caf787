"""Published models at their real dimensions with random weights, or tiny ones: no file of weights is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, field, frozen

from benchmarks.soar_variants import in_memory
from corefit.system.ranks import join
from corefit.train import weights
from corefit.train.job import Job, Silence
from corefit.train.loop import Loop
from corefit.types import Batch, Condition, Meta, ModelPath, Reward, Weighted
from corefit.types.stage import Full, Lora, Optimizer, Stage
from corefit_backbones import lowbit, network
from corefit_backbones.flux import Flux
from corefit_backbones.sd3 import Sd3

if TYPE_CHECKING:
    from torch import Tensor

LR = 1e-5
SPREAD = 0.02
"""Standard deviation of the random weights."""
LARGE = 60 << 30
"""Bytes of memory from which all weights of SD3.5-medium are trained, and not a LoRA."""


@frozen
class Drawn:
    """A tensor of a weight file that is drawn when it is read: random, on the device, and never all of them at once."""

    shape: Sequence[int]
    device: torch.device

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, rows: Any) -> Tensor:
        return (torch.randn(*self.shape, device=self.device) * SPREAD)[rows]


@define(eq=False, slots=False)
class Random:
    """Mixed into a backbone: `load` draws the weights that it would read, and packs them as it would."""

    drawn_vae: Any = field(init=False, default=None)

    def load(self: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.check_settings()
        parts = [self._drawn(self.checkpoint.config(name), device, dtype) for name in self.networks]
        self._set_up(self.joined(parts).to(device), device, dtype)

    def _drawn(self: Any, config: Any, device: torch.device, dtype: torch.dtype) -> Any:
        import diffusers

        made = network.empty(getattr(diffusers, self.transformer_class), config, dtype)
        found: Mapping[str, Any] = {name: Drawn(tuple(t.shape), device) for name, t in made.named_parameters()}
        if self.frozen:
            lowbit.swap(made, self.frozen)
            found = lowbit.packed(made, found, dtype, device)
        lowbit.fill(made, found, device)
        return made

    def vae(self: Any) -> Any:
        """A VAE with random weights."""
        import diffusers

        if self.drawn_vae is None:
            with torch.device(self._device):
                made = getattr(diffusers, self.vae_class).from_config(dict(self.checkpoint.config("vae")))
            self.drawn_vae = made.eval().requires_grad_(False)
        return self.drawn_vae


@define(eq=False, slots=False)
class RandomSd3(Random, Sd3):
    """SD3 and SD3.5 with random weights."""


@define(eq=False, slots=False)
class RandomFlux(Random, Flux):
    """FLUX.1 with random weights."""


@frozen
class Bright(Reward):
    """How bright a picture is: a reward that costs next to nothing."""

    def score(self, media: Tensor, prompts: Sequence[str], meta: Sequence[Meta]) -> Tensor:
        return media.flatten(1).mean(1)


@define(eq=False, kw_only=True)
class Subject:
    """A model that is about to be trained on random latents and conditions.

    device  where it is trained, in bfloat16 on a GPU and in float32 on a CPU
    rows    samples of a step
    """

    backbone: Any
    device: torch.device
    mode: Full | Lora
    rows: int
    shape: tuple[int, ...]
    _null: Condition | None = field(init=False, default=None)

    @property
    def precision(self) -> str:
        return "bf16" if self.device.type == "cuda" else "fp32"

    def condition(self, rows: int) -> Condition:
        """Random conditions of so many prompts."""
        shapes = self.backbone.condition_shapes()
        return Condition({name: torch.randn(rows, *shape, device=self.device) for name, shape in shapes.items()})

    @property
    def null(self) -> Condition:
        """The condition of the empty prompt, the same each time."""
        self._null = self._null or self.condition(1)
        return self._null

    def batch(self, group: int = 1) -> Batch:
        """A random batch whose prompts come in groups."""
        n = self.rows
        cond = {k: t.repeat_interleave(group, 0) for k, t in self.condition(n // group).tensors.items()}
        x0 = torch.randn(n, *self.shape, device=self.device)
        return Batch(x0, Condition(cond), ["a picture"] * n, [{}] * n, range(n), self.shape)

    def loop(self, objective: Any, sampler: Any = None) -> Loop:
        """corefit's loop over the model."""
        stage = Stage(
            name="gpu",
            steps=10**6,
            objective=objective,
            sampler=sampler,
            reward=(Weighted("bright", Bright()),) if sampler else (),
            batch=self.rows,
            optimizer=Optimizer(lr=LR),
        )
        job = Job(
            stage=stage,
            mode=self.mode,
            seed=0,
            backbone=self.backbone,
            dataset=in_memory(self.null, self.shape),
            order="epochs",
            folder=Path(),
            listener=Silence(),
            frozen_in_bf16=self._frozen_in_bf16,
        )
        return Loop.build(job, join(self.precision))

    def plain(self) -> Any:
        """The same model for a plain loop: loaded, with what trains in float32, and on a GPU under autocast."""
        from benchmarks import plain

        dtype = torch.bfloat16 if self._frozen_in_bf16 else torch.float32
        self.backbone.load(self.device, dtype)
        self.backbone.empty = self.null
        trained = weights.make_trainable(self.backbone, self.mode)
        optimizer = plain.adamw(list(trained.values()), LR)
        return plain.Network(self.backbone.transformer, optimizer, dtype, autocast=self.precision == "bf16")

    @property
    def _frozen_in_bf16(self) -> bool:
        return isinstance(self.mode, Lora) and self.precision == "bf16"


def sd3(folder: Path, device: torch.device, rows: int, *, quick: bool, **keys: Any) -> Subject:
    """SD3.5-medium on latents of 512 x 512 pixels; all weights train where memory allows, or else a LoRA."""
    if quick:
        backbone = RandomSd3(_tiny_sd3(folder), max_sequence_length=16, **keys)
        return _subject(backbone, device, Full(), rows, (16, 16))
    full = device.type != "cuda" or torch.cuda.get_device_properties(device).total_memory >= LARGE
    return _subject(
        RandomSd3(_real("SD3.5-medium"), **keys), device, Full() if full else Lora(rank=32), rows, (512, 512)
    )


def flux(folder: Path, device: torch.device, rows: int, *, quick: bool, **keys: Any) -> Subject:
    """A LoRA on FLUX.1-dev, on latents of 512 x 512 pixels."""
    mode = Lora(rank=4 if quick else 16)
    if quick:
        return _subject(RandomFlux(_tiny_flux(folder), max_sequence_length=16, **keys), device, mode, rows, (16, 16))
    return _subject(RandomFlux(_real("FLUX.1-dev"), **keys), device, mode, rows, (512, 512))


def _subject(backbone: Any, device: torch.device, mode: Full | Lora, rows: int, size: tuple[int, int]) -> Subject:
    torch.manual_seed(0)
    backbone.place(device, torch.float32)
    return Subject(backbone=backbone, device=device, mode=mode, rows=rows, shape=backbone.latent_shape(size))


def _real(name: str) -> ModelPath:
    from corefit_backbones import configs

    return ModelPath(str(configs.folder(name)))


def _tiny_sd3(folder: Path) -> ModelPath:
    from corefit.testing import tiny_sd3

    return ModelPath(str(tiny_sd3(folder / "sd3", words=["a"])))


def _tiny_flux(folder: Path) -> ModelPath:
    from corefit.testing.checkpoints import tiny_flux

    return ModelPath(str(tiny_flux(folder / "flux", words=["a"])))
