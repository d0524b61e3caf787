"""Make `base/`, the small Stable Diffusion 3 checkpoint that the words study starts from.

    python make_words_base.py [--out base] [--keep FOLDER] [--steps N] [--start FOLDER]

From random weights, with a fixed seed, on one thread: first the VAE, then transformer and text encoders together
with flow matching, on made-up words alone. The learning rate is constant and what is written is a running mean of
the weights, so the checkpoint of any step is what a run of that many steps would write. --start FOLDER goes on from
such a checkpoint, with a new optimizer; give it another --seed. The training itself is in ../../digits/make_base.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor
from words import FONTS, HEIGHT, PARTS, WIDTH, Part, Words, draw, english, prompt, write_prompts

from corefit.plugins import Host
from corefit.testing.checkpoints import tiny_sd3

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1] / "digits"))

from make_base import SHIFT, as_media, coded, latents, loaded, rows, sampled, save, tokens, train_flow, train_vae  # noqa: E402

SEED = 1
TEXT_LENGTH = 11
"""Tokens of CLIP and of T5 each: `the word "` and `"` around 5 letters, start and end."""
PICTURES, BATCH = 24576, 64
VAE_PICTURES, VAE_STEPS, VAE_BATCH, VAE_RATE = 4096, 500, 16, 3e-3
STEPS, DECAY = 3000, 0.995
KEPT_EVERY = 250


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


def pictures(count: int, fonts: Sequence[str] = ()) -> tuple[Tensor, list[str]]:
    """Made-up words as media [count, 3, 32, 96] in [-1, 1], and their prompts."""
    source = Words(count, SEED, "made up", tuple(fonts)) if fonts else Words(count, SEED, "made up")
    examples = list(source.examples())
    return as_media([e.media for e in examples]), [e.prompt for e in examples]


def read(media: Tensor, asked: Sequence[str]) -> dict[str, float]:
    """Share of media [n, 3, 32, 96] in [0, 1] that OCR reads right, and the mean of 1 - edit distance / letters."""
    ocr = Host().get("rewards", "ocr")
    meta = [{}] * len(asked)
    rewards = {"right": ocr(detect=False, strict=True, threads=1), "letters": ocr(detect=False, threads=1)}
    return {name: round(float(one.score(media, asked, meta).mean()), 3) for name, one in rewards.items()}


def measure(folder: Path, part: Part) -> dict[str, float]:
    """What OCR reads in one picture of each word of a part."""
    asked = [prompt(word) for word in english(part)]
    return read(sampled(folder, asked, TEXT_LENGTH, HEIGHT, WIDTH), asked)


def legible(vae: Any) -> Iterator[tuple[str, str, dict[str, float]]]:
    """What OCR reads in English words as drawn and through the VAE, for each font."""
    chosen = [word for part in PARTS for word in english(part)][::8]
    for font in FONTS:
        for name, media in coded(vae, as_media([draw(word, font) for word in chosen])).items():
            yield font, name, read(media, [prompt(word) for word in chosen])


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
        train_vae(pipeline.vae, pictures(VAE_PICTURES, [*FONTS])[0], VAE_STEPS, VAE_BATCH, VAE_RATE)
    media, texts = pictures(PICTURES)
    trained = train_flow(
        pipeline,
        latents(pipeline.vae, media),
        tokens(pipeline, texts, TEXT_LENGTH),
        tokens(pipeline, [""], TEXT_LENGTH),
        rows(PICTURES, BATCH, arguments.steps, arguments.seed),
        decay=DECAY,
        seed=arguments.seed,
        kept=(arguments.keep, KEPT_EVERY) if arguments.keep else None,
    )
    save(pipeline, trained, arguments.out)
    for line in legible(pipeline.vae):
        print("read right:", *line, flush=True)
    print("validation words:", measure(arguments.out, "validation"))


if __name__ == "__main__":
    main()
