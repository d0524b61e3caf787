"""Make `base/`, the small Stable Diffusion 3 checkpoint that the words study starts from.

    python make_words_base.py [--out base] [--keep FOLDER] [--steps N] [--start FOLDER]

From random weights, with a fixed seed, on one thread: first the VAE, then transformer and text encoders together
with flow matching, on made-up words alone. The learning rate is constant and what is written is a running mean of
the weights, so the checkpoint of any step is what a run of that many steps would write. --start FOLDER goes on from
such a checkpoint, with a new optimizer; give it another --seed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import frozen
from diffusers import StableDiffusion3Pipeline
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from words import FONTS, HEIGHT, PARTS, WIDTH, Part, Words, draw, english, prompt, write_prompts

from corefit.flow import expand_like, interpolate, shifted
from corefit.plugins import Host
from corefit.testing.checkpoints import tiny_sd3

HERE = Path(__file__).parent
SEED = 1
TEXT_LENGTH = 11
"""Tokens of CLIP and of T5 each: `the word "` and `"` around 5 letters, start and end."""
SHIFT = 2.0
PICTURES, BATCH = 24576, 64
VAE_PICTURES, VAE_STEPS, VAE_BATCH = 4096, 500, 16
STEPS = 3000
KEPT_EVERY = 250
DROPPED = 0.1
"""Share of prompts replaced by the empty one, for guidance."""
LEARNING_RATE = 1e-3
SAMPLER_STEPS, GUIDANCE = 16, 3.5
TRAINED = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def blank(folder: Path) -> StableDiffusion3Pipeline:
    """The random checkpoint, written to `folder` and loaded. Text is split into letters but for `the` and `word`."""
    tiny_sd3(
        folder,
        words=("the", "word"),
        seed=SEED,
        layers=4,
        heads=4,
        head_width=32,
        latent_size=24,
        vae_widths=(8, 16, 32),
        clip_widths=(48, 48),
        clip_length=TEXT_LENGTH,
        t5_width=96,
        shift=SHIFT,
    )
    return loaded(folder)


def loaded(folder: Path) -> StableDiffusion3Pipeline:
    """The checkpoint of a folder, in float32."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32)
    for part in (pipeline.transformer, pipeline.vae):
        part.register_to_config(_name_or_path="")  # or the files would name this machine's folders
    return pipeline


def pictures(count: int, fonts: Sequence[str] = ()) -> tuple[Tensor, list[str]]:
    """Made-up words as media [count, 3, 32, 96] in [-1, 1], and their prompts."""
    source = Words(count, SEED, "made up", tuple(fonts)) if fonts else Words(count, SEED, "made up")
    examples = list(source.examples())
    return as_media([e.media for e in examples]), [e.prompt for e in examples]


def as_media(drawn: Sequence[Any]) -> Tensor:
    """Media [n, 3, 32, 96] in [-1, 1] of n arrays [32, 96, 3] of bytes."""
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1


def rows(count: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches of row numbers, shuffled anew in every pass."""
    rng = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(count, generator=rng)
        yield order[:batch]
        order = order[batch:]


def train_vae(vae: Any) -> None:
    """Fit the VAE in place to words in all fonts, and measure its latents' shift and scale."""
    media, _ = pictures(VAE_PICTURES, [*FONTS])
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, VAE_STEPS)
    rng = torch.Generator().manual_seed(SEED)
    started = time.monotonic()
    for step, batch in enumerate(rows(len(media), VAE_BATCH, VAE_STEPS, SEED), 1):
        x = media[batch]
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample(rng)).sample
        loss = F.mse_loss(decoded, x) + 0.2 * F.l1_loss(decoded, x) + 1e-4 * posterior.kl().mean() / x[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"vae {step} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", flush=True)
    half(vae)
    z = latents(vae, media[:1024], raw=True)
    vae.register_to_config(shift_factor=round(z.mean().item(), 4), scaling_factor=round(1 / z.std().item(), 4))


@torch.no_grad()
def latents(vae: Any, media: Tensor, raw: bool = False) -> Tensor:
    """Mean latents [n, 4, 8, 24] of media [n, 3, 32, 96], normalized unless raw."""
    z = torch.cat([vae.encode(part).latent_dist.mode() for part in media.split(256)])
    return z if raw else (z - vae.config.shift_factor) * vae.config.scaling_factor


def half(module: torch.nn.Module) -> None:
    """Round the weights to what a float16 file holds; they stay float32."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(p.half())


def tokens(pipeline: StableDiffusion3Pipeline, prompts: Sequence[str]) -> Tensor:
    """Ids [n, 3, TEXT_LENGTH] of prompts for the three text encoders, padded as the pipeline pads them."""
    tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3)
    settings = {"padding": "max_length", "max_length": TEXT_LENGTH, "truncation": True}
    ids = [tokenizer(list(prompts), **settings).input_ids for tokenizer in tokenizers]
    return torch.tensor(ids).swapaxes(0, 1)


def embed(model: torch.nn.ModuleDict, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The pipeline's `encode_prompt` with gradients: embeddings [n, 22, 96], pooled [n, 96] of ids [n, 3, 11]."""
    clips = [
        model[name](ids[:, i], output_hidden_states=True) for i, name in enumerate(("text_encoder", "text_encoder_2"))
    ]
    t5 = model["text_encoder_3"](ids[:, 2])[0]
    clip = torch.cat([c.hidden_states[-2] for c in clips], -1)
    clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
    return torch.cat([clip, t5], 1), torch.cat([c.text_embeds for c in clips], -1)


@frozen(eq=False)
class Learner:
    """Transformer and text encoders under training, and the running mean of their weights."""

    model: torch.nn.ModuleDict
    mean: torch.nn.ModuleDict
    optimizer: torch.optim.Optimizer

    @staticmethod
    def of(pipeline: StableDiffusion3Pipeline) -> Learner:
        model = torch.nn.ModuleDict({name: getattr(pipeline, name) for name in TRAINED})
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.99))
        return Learner(model, deepcopy(model).requires_grad_(False), optimizer)

    def step(self, x0: Tensor, ids: Tensor, step: int, rng: torch.Generator) -> float:
        """Optimizer step number `step` on x0 [B, 4, 8, 24] and ids [B, 3, TEXT_LENGTH]; returns the loss."""
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
        self._average(min(0.995, step / (step + 9)))
        return loss.item()

    @torch.no_grad()
    def _average(self, decay: float) -> None:
        for mean, p in zip(self.mean.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(p, 1 - decay)


def train_flow(pipeline: StableDiffusion3Pipeline, steps: int, seed: int, out: Path, keep: Path | None) -> None:
    """Flow matching on the latents of made-up words, with the noise of `seed`; writes the base to `out`."""
    learner = Learner.of(pipeline)
    media, texts = pictures(PICTURES)
    x0, ids, empty = latents(pipeline.vae, media), tokens(pipeline, texts), tokens(pipeline, [""])
    rng = torch.Generator().manual_seed(seed)
    started, losses = time.monotonic(), list[float]()
    for step, batch in enumerate(rows(len(x0), BATCH, steps, seed), 1):
        dropped = torch.rand(len(batch), generator=rng) < DROPPED
        losses.append(learner.step(x0[batch], torch.where(expand_like(dropped, ids), empty, ids[batch]), step, rng))
        if step % 100 == 0:
            seconds = time.monotonic() - started
            print(f"step {step} loss {np.mean(losses[-100:]):.4f} {seconds:.0f} s", flush=True)
        if keep and step % KEPT_EVERY == 0:
            save(pipeline, learner.mean, keep / f"step-{step:05d}")
    save(pipeline, learner.mean, out)


def save(pipeline: StableDiffusion3Pipeline, trained: torch.nn.ModuleDict, folder: Path) -> None:
    """Write `pipeline` with the `trained` parts in place of its own, in float16."""
    parts = {**pipeline.components, **trained}
    halves = {n: deepcopy(p).half() if isinstance(p, torch.nn.Module) else p for n, p in parts.items()}
    StableDiffusion3Pipeline(**halves).save_pretrained(folder)


def read(media: Tensor, asked: Sequence[str]) -> dict[str, float]:
    """Share of media [n, 3, 32, 96] in [0, 1] that OCR reads right, and the mean of 1 - edit distance / letters."""
    ocr = Host().get("rewards", "ocr")
    meta = [{}] * len(asked)
    rewards = {"right": ocr(detect=False, strict=True, threads=1), "letters": ocr(detect=False, threads=1)}
    return {name: round(float(one.score(media, asked, meta).mean()), 3) for name, one in rewards.items()}


@torch.inference_mode()
def measure(folder: Path, part: Part) -> dict[str, float]:
    """What OCR reads in one picture of each word of a part."""
    pipeline = loaded(folder)
    pipeline.set_progress_bar_config(disable=True)
    asked = [prompt(word) for word in english(part)]
    rng = torch.Generator().manual_seed(SEED)
    made = [
        pipeline(
            asked[i : i + 64],
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=SAMPLER_STEPS,
            guidance_scale=GUIDANCE,
            max_sequence_length=TEXT_LENGTH,
            generator=rng,
            output_type="pt",
        ).images
        for i in range(0, len(asked), 64)
    ]
    return read(torch.cat(made), asked)


@torch.no_grad()
def legible(vae: Any) -> Iterator[tuple[str, str, dict[str, float]]]:
    """What OCR reads in English words as drawn and through the VAE, for each font."""
    chosen = [word for part in PARTS for word in english(part)][::8]
    for font in FONTS:
        media = as_media([draw(word, font) for word in chosen])
        decoded = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in media.split(64)])
        for name, x in {"as drawn": media, "through the VAE": decoded}.items():
            yield font, name, read((x / 2 + 0.5).clamp(0, 1), [prompt(word) for word in chosen])


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the base checkpoint of the words study.")
    parser.add_argument("--out", type=Path, default=HERE / "base")
    parser.add_argument("--keep", type=Path, help=f"also keep what every {KEPT_EVERY}th step would write here")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--start", type=Path, help="go on from the checkpoint in this folder")
    parser.add_argument("--seed", type=int, default=SEED + 1, help="of the noise; take another one with --start")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    write_prompts()
    if arguments.start:
        pipeline = loaded(arguments.start)
    else:
        pipeline = blank(arguments.out)
        train_vae(pipeline.vae)
    train_flow(pipeline, arguments.steps, arguments.seed, arguments.out, arguments.keep)
    for line in legible(pipeline.vae):
        print("read right:", *line, flush=True)
    print("validation words:", measure(arguments.out, "validation"))


if __name__ == "__main__":
    main()
