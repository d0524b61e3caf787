"""One SOAR step written several ways, over one network, one set of inputs and the same weights throughout.

The learning rate is so small that no float32 weight changes: every step of every variant is the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, frozen
from diffusers import SD3Transformer2DModel

from corefit.rng import Rng
from corefit.rollout.noise import LogitNormal
from corefit.system.ranks import join
from corefit.train.job import Job, Silence
from corefit.train.loop import Loop
from corefit.types import Batch, Condition, ModelPath
from corefit.types.stage import Full, Optimizer, Stage
from corefit_backbones.sd3 import Sd3
from corefit_sft import Sft
from corefit_soar.objective import Soar

if TYPE_CHECKING:
    from torch import Tensor

SEED, STAGE, SHIFT = 0, "benchmark", 3.0
POINTS, STEPS, GUIDANCE = 6, 40, 4.5
LR, MAX_NORM = 1e-30, 1.0


@frozen
class Size:
    """An SD3 transformer and its batch; heads are 64 wide, latents have 16 channels and patches of 2 x 2."""

    layers: int
    heads: int
    latents: int
    tokens: int
    batch: int

    def transformer(self) -> torch.nn.Module:
        """With random weights, the same each time."""
        torch.manual_seed(SEED)
        width = 64 * self.heads
        return SD3Transformer2DModel(
            sample_size=self.latents,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=self.layers,
            attention_head_dim=64,
            num_attention_heads=self.heads,
            joint_attention_dim=width,
            caption_projection_dim=width,
            pooled_projection_dim=width,
            pos_embed_max_size=self.latents,
        ).train()

    def condition(self, rows: int) -> Condition:
        width = 64 * self.heads
        embeds, pooled = torch.randn(rows, self.tokens, width), torch.randn(rows, width)
        return Condition({"prompt_embeds": embeds, "pooled": pooled})


FULL = Size(layers=8, heads=8, latents=16, tokens=64, batch=4)
QUICK = Size(layers=2, heads=2, latents=8, tokens=16, batch=2)


class InMemory(Sd3):
    """corefit's SD3 backbone on a network that is there already: no folder, VAE or text encoder."""

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        self.place(device, dtype)

    def shift(self, shape: Sequence[int]) -> float:
        return SHIFT


@frozen(eq=False)
class Inputs:
    """What a step is computed from. Latents [B, ...], levels [B]; the draws that corefit's step 0 makes itself."""

    z0: Tensor
    eps: Tensor
    s: Tensor
    uniforms: Sequence[Tensor]
    """Per point: where between the rollout's end and 1 it lies."""
    cond: Mapping[str, Tensor]
    null: Mapping[str, Tensor]
    """The empty prompt's, one row."""

    @staticmethod
    def of(size: Size) -> Inputs:
        torch.manual_seed(SEED + 1)
        z0 = torch.randn(size.batch, 16, size.latents, size.latents)
        rng = Rng((SEED, STAGE, 0, "terms", 0), range(size.batch))
        eps, s = rng.randn(tuple(z0.shape)), LogitNormal().sample(size.batch, SHIFT, rng)
        uniforms = [rng.rand(size.batch) for _ in range(POINTS)]
        return Inputs(z0, eps, s, uniforms, size.condition(size.batch).tensors, size.condition(1).tensors)

    @property
    def batch(self) -> Batch:
        n = len(self.z0)
        return Batch(self.z0, Condition(self.cond), [""] * n, [{}] * n, range(n), tuple(self.z0.shape[1:]))


@define(eq=False)
class Bench:
    """What all variants share. Two optimizers: corefit's loop leaves a mark on its own."""

    transformer: Any
    inputs: Inputs
    loops: torch.optim.Optimizer
    plain: torch.optim.Optimizer

    @staticmethod
    def of(size: Size) -> Bench:
        transformer = size.transformer()
        return Bench(transformer, Inputs.of(size), _adamw(transformer), _adamw(transformer))

    def ready(self, name: str) -> Callable[[], None]:
        """The step of a variant, with the transformer set to keep or recompute its activations as it asks."""
        variant = VARIANTS[name]
        if variant.checkpointing:
            self.transformer.enable_gradient_checkpointing()
        else:
            self.transformer.disable_gradient_checkpointing()
        return variant.step(self)


@frozen
class Variant:
    """One way to write a step; it leaves no gradient behind."""

    says: str
    step: Callable[[Bench], Callable[[], None]]
    checkpointing: bool = False


def _adamw(transformer: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(transformer.parameters(), lr=LR, fused=True)


def corefit_step(objective: Soar | Sft) -> Callable[[Bench], Callable[[], None]]:
    """corefit's own training step, on the same draws each time."""

    def ready(bench: Bench) -> Callable[[], None]:
        batch, loop = bench.inputs.batch, loop_of(objective, bench)

        def step() -> None:
            loop.take_step(batch)

        return step

    return ready


def loop_of(objective: Soar | Sft, bench: Bench) -> Loop:
    """A training loop that is about to take its first step."""
    backbone = InMemory(ModelPath("in memory"))
    backbone.transformer = bench.transformer
    job = Job(
        stage=Stage(name=STAGE, steps=1, objective=objective, batch=len(bench.inputs.z0), optimizer=Optimizer(lr=LR)),
        mode=Full(),
        seed=SEED,
        backbone=backbone,
        dataset=in_memory(Condition(bench.inputs.null), bench.inputs.batch.shape),
        order="epochs",
        folder=Path(),
        listener=Silence(),
    )
    loop = Loop.build(job, join("fp32"))
    loop.state.optimizer.made = bench.loops
    return loop


def in_memory(null: Condition, shape: Sequence[int]) -> Any:
    """All that a loop asks of a dataset outside `batches`: the empty prompt's condition, and the latents' shapes."""
    return SimpleNamespace(null=null, manifest=SimpleNamespace(shapes=[tuple(shape)]))


def _soar(chunk: int) -> Soar:
    return Soar(points=POINTS, guidance=GUIDANCE, steps=STEPS, chunk=chunk)


@frozen(eq=False)
class Plain:
    """SOAR's step in plain PyTorch (paper, eq. 9 to 15), with nothing of corefit."""

    bench: Bench

    @property
    def inputs(self) -> Inputs:
        return self.bench.inputs

    def floor(self) -> None:
        """Each pass that the gradient needs once, and no more than one graph at a time."""
        i = self.inputs
        z = _mix(i.z0, i.eps, i.s)
        v = self._velocity(z, i.s, i.cond)
        self._loss(v, i.eps - i.z0).backward()
        v = v.detach()
        with torch.no_grad():
            v_null = self._velocity(z, i.s, self._null())
        for state, level, target in self._points(z, v_null + GUIDANCE * (v - v_null)):
            self._loss(self._velocity(state, level, i.cond), target).backward()
        self._update()

    def published(self) -> None:
        """As the published step does it: a rollout with a graph that nobody needs, and one backward for all."""
        i = self.inputs
        z = _mix(i.z0, i.eps, i.s)
        both = {key: torch.cat([null, i.cond[key]]) for key, null in self._null().items()}
        rollout = self._velocity(torch.cat([z, z]), torch.cat([i.s, i.s]), both)
        v_null, v_cond = rollout.chunk(2)
        guided = (v_null + GUIDANCE * (v_cond - v_null)).detach()
        losses = [self._loss(self._velocity(z, i.s, i.cond), i.eps - i.z0)]
        for state, level, target in self._points(z, guided):
            losses.append(self._loss(self._velocity(state, level, i.cond), target))
        torch.stack(losses).sum().backward()
        self._update()
        del rollout, v_null, v_cond  # not earlier: the published names live until the next step

    def _points(self, z: Tensor, guided: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(state, level, target) of each correction point: one Euler step along `guided`, then back toward eps."""
        i = self.inputs
        time = (i.s / (SHIFT - (SHIFT - 1) * i.s) - 1 / STEPS).clamp(min=0)
        low = SHIFT * time / (1 + (SHIFT - 1) * time)
        stepped = z + _wide(low - i.s) * guided
        for uniform in i.uniforms:
            level = low + uniform * (1 - low)
            state = _mix(stepped, i.eps, (level - low) / (1 - low))
            yield state, level, (state - i.z0) / _wide(level)

    def _velocity(self, z: Tensor, s: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return self.bench.transformer(
            hidden_states=z,
            timestep=1000 * s,
            encoder_hidden_states=cond["prompt_embeds"],
            pooled_projections=cond["pooled"],
            return_dict=False,
        )[0]

    def _loss(self, v: Tensor, target: Tensor) -> Tensor:
        """Divided by all supervised items, so that the sum over passes is the step's loss."""
        items = len(v) * (1 + POINTS)
        return ((v - target) ** 2).flatten(1).mean(1).sum() / items

    def _null(self) -> dict[str, Tensor]:
        return {key: t.expand(len(self.inputs.z0), *t.shape[1:]) for key, t in self.inputs.null.items()}

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.bench.transformer.parameters(), MAX_NORM)
        self.bench.plain.step()
        self.bench.plain.zero_grad(set_to_none=True)


VARIANTS: Mapping[str, Variant] = {
    "floor": Variant("the same passes in a plain loop", lambda bench: Plain(bench).floor),
    "soar": Variant("corefit, chunk = 1", corefit_step(_soar(1))),
    "published": Variant("as published, checkpointing", lambda bench: Plain(bench).published, checkpointing=True),
    "sft": Variant("corefit's sft, for scale", corefit_step(Sft())),
    "soar 3": Variant("corefit, chunk = 3", corefit_step(_soar(3))),
    "soar 6": Variant("corefit, chunk = 6", corefit_step(_soar(6))),
    "published, kept": Variant("as published, all graphs kept", lambda bench: Plain(bench).published),
}


def _wide(s: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return s[:, None, None, None]


def _mix(z: Tensor, eps: Tensor, s: Tensor) -> Tensor:
    return (1 - _wide(s)) * z + _wide(s) * eps
