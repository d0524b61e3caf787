"""Make `base/`, the small Stable Diffusion 3 checkpoint that the digits example starts from.

    python make_base.py [--out base] [--keep FOLDER]

From random weights, with a fixed seed, on one thread: first the VAE, then transformer and text encoders
together with flow matching. The learning rate is constant and the shipped weights are a running mean, so the
checkpoint of any step is what a run of that many steps would ship; --keep FOLDER writes every 100th.
It stops early on purpose: about half of the held-out prompts come out right, which leaves room to improve.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import frozen
from diffusers import StableDiffusion3Pipeline
from digits import CATEGORIES, SIZE, WORDS, DigitScenes, Evaluator, Scene, draw, held_out_prompts, write_held_out
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from corefit.flow import expand_like, interpolate, shifted
from corefit.testing.checkpoints import tiny_sd3

HERE = Path(__file__).parent
SEED = 1
TEXT_LENGTH = 10
"""Tokens of CLIP and of T5 each; the longest prompt, "a red 3 right of a blue 7", fills CLIP's exactly."""
SHIFT = 2.0
SCENES, BATCH = 40960, 128
VAE_STEPS, STEPS = 2000, 1100
KEPT_EVERY = 100
DROPPED = 0.1
"""Share of prompts replaced by the empty one, for guidance."""
LEARNING_RATE, DECAY = 1e-3, 0.998
SAMPLER_STEPS, GUIDANCE = 16, 3.5


def blank(folder: Path) -> StableDiffusion3Pipeline:
    """The random checkpoint, written to `folder` and loaded."""
    tiny_sd3(
        folder,
        words=WORDS,
        seed=SEED,
        layers=4,
        heads=4,
        head_width=32,
        vae_widths=(16, 32),
        clip_widths=(32, 32),
        clip_length=TEXT_LENGTH,
        t5_width=96,
        shift=SHIFT,
    )
    return loaded(folder)


def loaded(folder: Path) -> StableDiffusion3Pipeline:
    """The checkpoint of a folder, in float32."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32)
    for part in (pipeline.transformer, pipeline.vae):
        part.register_to_config(_name_or_path="")  # or the shipped files would name this machine's folders
    return pipeline


def pictures(count: int) -> tuple[Tensor, list[str]]:
    """Training scenes [count, 3, 16, 16] in [-1, 1], and their prompts."""
    examples = list(DigitScenes(count, SEED).examples())
    return as_media([e.media for e in examples]), [e.prompt for e in examples]


def as_media(drawn: Sequence[Any]) -> Tensor:
    """Media [n, 3, H, W] in [-1, 1] of n arrays [H, W, 3] of bytes."""
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1


def rows(count: int, batch: int, steps: int, seed: int = SEED) -> Iterator[Tensor]:
    """`steps` batches of row numbers, shuffled anew in every pass."""
    rng = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(count, generator=rng)
        yield order[:batch]
        order = order[batch:]


def train_vae(vae: Any, media: Tensor, steps: int = VAE_STEPS, batch: int = 64, lr: float = 2e-3) -> None:
    """Fit the VAE in place to media [n, 3, H, W] in [-1, 1], and measure its latents' shift and scale."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    rng = torch.Generator().manual_seed(SEED)
    for step, chosen in enumerate(rows(len(media), batch, steps)):
        x = media[chosen]
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample(rng)).sample
        loss = F.mse_loss(decoded, x) + 0.2 * F.l1_loss(decoded, x) + 1e-4 * posterior.kl().mean() / x[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"vae {step} loss {loss.item():.4f} std {posterior.std.mean().item():.3f}", flush=True)
    half(vae)
    z = latents(vae, media[:4096], raw=True)
    vae.register_to_config(shift_factor=round(z.mean().item(), 4), scaling_factor=round(1 / z.std().item(), 4))


@torch.no_grad()
def latents(vae: Any, media: Tensor, raw: bool = False) -> Tensor:
    """Mean latents [n, 4, H / f, W / f] of media [n, 3, H, W], normalized unless raw; f is the VAE's factor."""
    z = torch.cat([vae.encode(part).latent_dist.mode() for part in media.split(256)])
    return z if raw else (z - vae.config.shift_factor) * vae.config.scaling_factor


def half(module: torch.nn.Module) -> None:
    """Round the weights to what a float16 file holds; they stay float32."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(p.half())


TRAINED = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def tokens(pipeline: StableDiffusion3Pipeline, prompts: Sequence[str], length: int = TEXT_LENGTH) -> Tensor:
    """Ids [n, 3, length] of prompts for the three text encoders, padded as the pipeline pads them."""
    tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3)
    settings = {"padding": "max_length", "max_length": length, "truncation": True}
    ids = [tokenizer(list(prompts), **settings).input_ids for tokenizer in tokenizers]
    return torch.tensor(ids).swapaxes(0, 1)


def embed(model: torch.nn.ModuleDict, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The pipeline's `encode_prompt` with gradients: embeddings [n, 2 L, width], pooled [n, width] of ids [n, 3, L]."""
    clips = [
        model[name](ids[:, i], output_hidden_states=True) for i, name in enumerate(("text_encoder", "text_encoder_2"))
    ]
    t5 = model["text_encoder_3"](ids[:, 2])[0]
    clip = torch.cat([c.hidden_states[-2] for c in clips], -1)
    clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
    return torch.cat([clip, t5], 1), torch.cat([c.text_embeds for c in clips], -1)


@frozen(eq=False)
class Learner:
    """Transformer and text encoders under training, and the running mean of their weights, which decays by `decay`."""

    model: torch.nn.ModuleDict
    mean: torch.nn.ModuleDict
    optimizer: torch.optim.Optimizer
    decay: float

    @staticmethod
    def of(pipeline: StableDiffusion3Pipeline, decay: float) -> Learner:
        model = torch.nn.ModuleDict({name: getattr(pipeline, name) for name in TRAINED})
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.99))
        return Learner(model, deepcopy(model).requires_grad_(False), optimizer, decay)

    def step(self, x0: Tensor, ids: Tensor, step: int, rng: torch.Generator) -> float:
        """Optimizer step number `step` on latents x0 [B, 4, h, w] and ids [B, 3, L]; returns the loss."""
        noise = torch.randn(x0.shape, generator=rng)
        sigma = shifted(torch.sigmoid(torch.randn(len(x0), generator=rng)), SHIFT)
        # torch's fused attention has a backward pass that is slow on CPUs where the sequence is short
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            embeddings, pooled = embed(self.model, ids)
            v = self.model["transformer"](interpolate(x0, noise, sigma), embeddings, pooled, 1000 * sigma)[0]
        loss = F.mse_loss(v.float(), noise - x0)
        self.optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, step / 200)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self._average(min(self.decay, step / (step + 9)))
        return loss.item()

    @torch.no_grad()
    def _average(self, decay: float) -> None:
        for mean, p in zip(self.mean.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(p, 1 - decay)


def train_flow(
    pipeline: StableDiffusion3Pipeline,
    x0: Tensor,
    ids: Tensor,
    empty: Tensor,
    batches: Iterator[Tensor],
    *,
    decay: float,
    seed: int,
    kept: tuple[Path, int] | None,
) -> torch.nn.ModuleDict:
    """Flow matching on latents x0 [n, 4, h, w] and ids [n, 3, L]; returns the mean of the weights.

    empty  ids [1, 3, L] of the empty prompt
    kept   a folder for checkpoints, and the steps between them
    """
    learner = Learner.of(pipeline, decay)
    rng = torch.Generator().manual_seed(seed)
    started, losses = time.monotonic(), list[float]()
    for step, batch in enumerate(batches, 1):
        dropped = torch.rand(len(batch), generator=rng) < DROPPED
        losses.append(learner.step(x0[batch], torch.where(expand_like(dropped, ids), empty, ids[batch]), step, rng))
        if step % 100 == 0:
            seconds = time.monotonic() - started
            print(f"step {step} loss {np.mean(losses[-100:]):.4f} {seconds:.0f} s", flush=True)
        if kept and step % kept[1] == 0:
            save(pipeline, learner.mean, kept[0] / f"step-{step:05d}")
    return learner.mean


def save(pipeline: StableDiffusion3Pipeline, trained: torch.nn.ModuleDict, folder: Path) -> None:
    """Write `pipeline` with the `trained` parts in place of its own, in float16."""
    parts = {**pipeline.components, **trained}
    halves = {n: deepcopy(p).half() if isinstance(p, torch.nn.Module) else p for n, p in parts.items()}
    StableDiffusion3Pipeline(**halves).save_pretrained(folder)


@torch.inference_mode()
def sampled(folder: Path, prompts: Sequence[str], length: int, height: int, width: int) -> Tensor:
    """Pictures [n, 3, H, W] in [0, 1] of a checkpoint, one for each prompt."""
    pipeline = loaded(folder)
    pipeline.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(SEED)
    made = [
        pipeline(
            list(prompts[i : i + 64]),
            height=height,
            width=width,
            num_inference_steps=SAMPLER_STEPS,
            guidance_scale=GUIDANCE,
            max_sequence_length=length,
            generator=rng,
            output_type="pt",
        ).images
        for i in range(0, len(prompts), 64)
    ]
    return torch.cat(made)


def measure(folder: Path, count: int) -> dict[str, float]:
    """Share of wholly right pictures of the first `count` held-out prompts, by category."""
    wanted = list(held_out_prompts(count))
    made = sampled(folder, [row["prompt"] for row in wanted], TEXT_LENGTH, SIZE, SIZE)
    scores = Evaluator().score(made, [], wanted).numpy()
    shares = {c: scores[i :: len(CATEGORIES)].mean() for i, c in enumerate(CATEGORIES)}
    return {name: round(float(v), 3) for name, v in {"all": scores.mean(), **shares}.items()}


@torch.no_grad()
def coded(vae: Any, media: Tensor) -> Mapping[str, Tensor]:
    """Media [n, 3, H, W] in [-1, 1] as they are and as the VAE decodes them, in [0, 1]."""
    decoded = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in media.split(64)])
    return {name: (x / 2 + 0.5).clamp(0, 1) for name, x in {"as drawn": media, "through the VAE": decoded}.items()}


def legible(vae: Any) -> dict[str, float]:
    """Share of scenes, written with digits that neither VAE nor judge has seen, that the judge finds right."""
    rng = np.random.Generator(np.random.Philox(SEED))
    wanted = [Scene.of(row) for row in held_out_prompts(1000)]
    media = as_media([draw(scene, rng, "judge-test") for scene in wanted])
    meta = [scene.meta for scene in wanted]
    scores = {name: Evaluator().score(x, [], meta) for name, x in coded(vae, media).items()}
    return {name: round(s.mean().item(), 4) for name, s in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the base checkpoint of the digits example.")
    parser.add_argument("--out", type=Path, default=HERE / "base")
    parser.add_argument("--keep", type=Path, help="also keep what every 100th step would ship here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    write_held_out(HERE / "heldout.jsonl")
    pipeline = blank(arguments.out)
    train_vae(pipeline.vae, pictures(8192)[0])
    print("wholly right scenes", legible(pipeline.vae), flush=True)
    media, prompts = pictures(SCENES)
    kept = (arguments.keep, KEPT_EVERY) if arguments.keep else None
    trained = train_flow(
        pipeline,
        latents(pipeline.vae, media),
        tokens(pipeline, prompts),
        tokens(pipeline, [""]),
        rows(SCENES, BATCH, STEPS),
        decay=DECAY,
        seed=SEED + 1,
        kept=kept,
    )
    save(pipeline, trained, arguments.out)
    print("held-out prompts wholly right", measure(arguments.out, 1025))


if __name__ == "__main__":
    main()
