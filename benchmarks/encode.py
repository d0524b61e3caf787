"""What encoding costs: pictures a second into the cache, against the VAE and the text encoders alone."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import comparing, subject
from benchmarks.comparing import Comparison, Floor, Side

TARGET = 1.03
COUNT, BATCH = 8, 4
SIDE = 192
"""Pixels; the files are larger and are resized."""
FULL: dict[str, Any] = {
    "vae_widths": (32, 64, 128, 128),
    "vae_layers": 2,
    "clip_widths": (128, 256),
    "t5_width": 512,
    "t5_layers": 6,
    "layers": 1,
}
QUICK: dict[str, Any] = {"layers": 1}


def build(folder: Path, quick: bool) -> Comparison:
    """Make both over the same encoders; each run encodes all pictures and their captions."""
    import torch

    from corefit.data import cache, coding
    from corefit.data.settings import Data
    from corefit.data.sources import Jsonl

    side = 32 if quick else SIDE
    backbone = subject.backbone(folder, True, **(QUICK if quick else FULL))
    # what is done once for a cache is a matter of the start: models are read, and how many rows fit is estimated
    backbone.release = lambda: None
    coding.row_bytes = _once(coding.row_bytes)
    lines = _write(folder, side + side // 4)
    described = Data(Jsonl(lines), size=(side, side), encode_batch=BATCH)
    numbers = itertools.count()
    prompts = [f"picture {n}" for n in range(COUNT)]
    media = torch.rand(COUNT, 3, side, side) * 2 - 1

    def into_cache() -> None:
        root = folder / f"cache-{next(numbers)}"
        cache.prepare(described, backbone, root, media=True)
        shutil.rmtree(root)

    @torch.no_grad()
    def bare() -> None:
        vae, text = backbone.vae(), backbone.text()
        for first in range(0, COUNT, BATCH):
            rows = slice(first, first + BATCH)
            _ = text.encode_prompt(
                prompts[rows], None, None, do_classifier_free_guidance=False, max_sequence_length=subject.LENGTH
            )
            _ = vae.encode(media[rows]).latent_dist.mode()
        _ = text.encode_prompt([""], None, None, do_classifier_free_guidance=False, max_sequence_length=subject.LENGTH)

    return Comparison(
        sides={
            "bare": Side("the VAE and the text encoders alone, tensors in memory", bare),
            "encode": Side("corefit: files read and resized, rows written, hashed", into_cache),
        },
        floors=[Floor("encode", "bare", TARGET)],
        of=f"{COUNT} pictures and captions",
        size={"pixels": side, "encode_batch": BATCH},
        amount=COUNT,
    )


def _once(estimate: Callable[..., int | None]) -> Callable[..., int | None]:
    """Return an estimate that is made once for each shape; all are of one backbone."""
    made: dict[Any, int | None] = {}

    def known(backbone: Any, what: str, shape: Sequence[int]) -> int | None:
        key = (what, *shape)
        if key not in made:
            made[key] = estimate(backbone, what, shape)
        return made[key]

    return known


def _write(folder: Path, side: int) -> Path:
    """Write photographs, or what costs as much to read, and their captions."""
    from PIL import Image

    lines = list[str]()
    for n in range(COUNT):
        coarse = np.random.default_rng(n).integers(0, 256, (side // 8, side // 8, 3), np.uint8)
        Image.fromarray(coarse).resize((side, side)).save(folder / f"{n}.jpg", quality=90)
        lines.append(json.dumps({"media": f"{n}.jpg", "prompt": f"picture {n}"}) + "\n")
    path = folder / "train.jsonl"
    path.write_text("".join(lines))
    return path


encode = comparing.command(
    "encode", build, "Pictures a second into the cache against the bare VAE and encoders (2 minutes).", rounds=12
)
