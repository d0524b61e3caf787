"""Choose how to train on what a folder holds: by rules of thumb, which the comments of the written file name."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from attrs import frozen

from corefit.cli.starting.survey import Survey
from corefit.data import buckets
from corefit.data.buckets import Aspect
from corefit.errors import ConfigError, DataError
from corefit.types import Backbone

SIDES = (1024, 768, 512, 384, 256, 192, 128, 96, 64, 48, 32, 16)
"""Sides of the squares that sizes are chosen from; buckets have the area of the square."""
ENLARGED = 0.25
"""Share of the pictures that may be smaller than the size chosen: enlarged pictures teach blur."""
SMALLEST = 4
"""Sides smaller than a fourth of the largest one are not worth training on, to save memory."""
ASPECTS = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "2:1", "1:2")
FEWEST = 0.05
"""Share of the pictures, at least, that an aspect ratio of its own is worth."""
FRAMES = (81, 65, 49, 33, 25, 17, 13, 9, 5)
"""Numbers of frames that are chosen from: video models take 4k + 1."""
RATE = 16
"""Frames a second to which faster clips are sampled, the rate of Wan."""
BATCHES = ((100, 4), (1000, 8), (10_000, 16), (math.inf, 32))
"""(number of pictures up to which, the batch)."""
RANKS = ((1000, 16), (math.inf, 32))
"""(number of pictures up to which, the rank of the LoRA)."""
EACH, FEW = 100, 20
"""How often each of FEW pictures is seen. More of them are seen less often, by the root of their number."""
PIXELS = 2 * 1024 * 1024
"""Pixels that the VAE encodes or decodes at once; a full-size VAE takes 3 to 5 GiB for a million."""
PROMPTS = 8
"""Prompts of [eval] that are taken from the captions."""
AROUND = ("{}", "a photo of {}", "a painting of {}", "{} on a beach at sunset", "a photo of a city street")
"""Prompts around a trigger word, where captions are missing; the last one lacks it."""


@frozen(kw_only=True)
class Choice:
    """What the pipeline file will say.

    size      [height, width], or [frames, height, width]
    aspects   the buckets, none for one square size
    fps       the rate to which clips are sampled; None for pictures and for slower clips
    micro     rows of a forward
    recompute whether gradient checkpointing is on
    keys      further lines of [backbone] that save memory
    """

    size: tuple[int, ...]
    aspects: tuple[str, ...] = ()
    fps: int | None = None
    batch: int
    steps: int
    rank: int
    micro: int = 1
    recompute: bool = False
    keys: tuple[str, ...] = ()

    @property
    def seen(self) -> float:
        """How many samples the stage trains on."""
        return self.batch * self.steps

    @property
    def at_once(self) -> int:
        """How many media the VAE may encode or decode at once, 16 at most."""
        return max(1, min(16, PIXELS // math.prod(self.size)))


def plan(count: int) -> tuple[int, int, int]:
    """Return batch, steps and the rank of the LoRA for so many pictures."""
    batch, rank = (next(value for most, value in table if count < most) for table in (BATCHES, RANKS))
    seen = max(count, EACH * min(count, FEW) * math.sqrt(max(1.0, count / FEW)))
    steps = math.ceil(seen / batch / 50) * 50
    return batch, steps, rank


def sides(found: Survey, most: int, backbone: Backbone | None) -> Sequence[int]:
    """Return the sides of squares that suit the pictures, largest first; DataError where the pictures are too small.

    most      the largest side, that of what the model makes
    backbone  None where the model's files are not at hand
    """
    areas = sorted(height * width for height, width in found.sizes)
    limit = areas[int(ENLARGED * len(areas))]
    suited = [side for side in SIDES if side <= most and side**2 <= limit and _takes(backbone, (side, side), found)]
    if not suited:
        raise DataError(
            f"the {found.noun}s are too small: a quarter of them have at most {limit} pixels, as a square of "
            f"{math.isqrt(limit)} x {math.isqrt(limit)} has, and the model takes no size below that"
        )
    return [side for side in suited if side * SMALLEST >= suited[0]]


def _takes(backbone: Backbone | None, size: tuple[int, ...], found: Survey) -> bool:
    if backbone is None:
        return True
    try:
        backbone.latent_shape((FRAMES[-1], *size) if found.frames else size)
    except ConfigError:
        return False
    return True


def frames(found: Survey) -> tuple[Sequence[int], int | None]:
    """Return the numbers of frames that all clips have, largest first, and the rate to sample them at; (), None for
    pictures. DataError for clips that are too short.
    """
    if not found.frames:
        return (), None
    fps = RATE if all(rate > RATE for _, rate in found.frames) else None
    shortest = min(int(number * fps / rate) if fps else number for number, rate in found.frames)
    numbers = [number for number in FRAMES if number <= shortest]
    if not numbers:
        raise DataError(f"the shortest clip has {shortest} frames, and {FRAMES[-1]} are the least; remove such clips")
    return numbers, fps


def aspects(found: Survey, size: tuple[int, ...], batch: int, backbone: Backbone | None) -> tuple[str, ...]:
    """Return the aspect ratios that enough pictures have, the most frequent first; () where all are square enough.

    The ratio that fewest pictures are nearest to is left out until each has at least a batch, and FEWEST, of them.
    """
    kept = list(ASPECTS)
    while True:
        nearest = Counter(kept[_nearest(height, width, kept)] for height, width in found.sizes)
        fewest = min(kept, key=lambda aspect: nearest[aspect])
        if len(kept) == 1 or nearest[fewest] >= max(batch, FEWEST * found.count):
            break
        kept.remove(fewest)
    chosen: list[str] = []
    for aspect in sorted(kept, key=lambda aspect: -nearest[aspect]):
        if backbone is None or _distinct(size, [*chosen, aspect], backbone):
            chosen.append(aspect)
    return () if chosen == ["1:1"] else tuple(chosen)


def _nearest(height: int, width: int, kept: Sequence[str]) -> int:
    return buckets.nearest(height, width, [(each.height, each.width) for each in map(Aspect.parse, kept)])


def _distinct(size: tuple[int, ...], chosen: Sequence[str], backbone: Backbone) -> bool:
    """Return whether the model has a size for each of these ratios; small sizes of near ratios are the same."""
    try:
        buckets.sizes(size, chosen, backbone)
    except ConfigError:
        return False
    return True


def spread(found: Survey, chosen: Choice) -> Sequence[tuple[str, int]]:
    """Return for each aspect ratio how many pictures go to it."""
    kept = chosen.aspects or ("1:1",)
    nearest = Counter(kept[_nearest(height, width, kept)] for height, width in found.sizes)
    return [(aspect, nearest[aspect]) for aspect in kept]


def cropped(found: Survey, kept: Sequence[str]) -> float:
    """Return the share of a picture that cropping removes, on average."""
    ratios = [Aspect.parse(aspect).ratio for aspect in kept or ("1:1",)]
    lost = 0.0
    for height, width in found.sizes:
        ratio = width / height
        lost += 1 - max(min(ratio, each) / max(ratio, each) for each in ratios)
    return lost / found.count


def prompts(found: Survey, trigger: str | None, triggered: Sequence[str]) -> tuple[Sequence[str], str]:
    """Return prompts for samples, and what is to be said about them.

    triggered  the first caption of each picture as it is trained on, "" where it is the trigger alone
    """
    distinct = list(dict.fromkeys(text for text in triggered if text and text != trigger))
    if len(distinct) < PROMPTS // 2 and trigger is not None:
        said = "Around the trigger word; the last one lacks it, and shows what else changes."
        return [text.format(trigger) for text in AROUND], said
    ends = [round(n * len(distinct) / PROMPTS) for n in range(PROMPTS + 1)]
    chosen = distinct if len(distinct) <= PROMPTS else [distinct[start] for start, _ in pairwise(ends)]
    said = "Captions, spread over the folder. They are trained on, too: add some of your own to see what new ones give."
    if trigger is not None and (plain := next((texts[0] for texts in found.captions if texts), "")) not in chosen:
        chosen = [*chosen, plain]
        said += " The last one lacks the trigger word, and shows what else changes."
    return chosen, said
