"""Short words in real fonts: a source of pictures [32, 96] that show one word each, and the words of each part.

The English words of english.txt are cut into three parts by their hashes: "train", which the source draws;
"validation", on which settings may be chosen; "heldout", which nothing is chosen on. The base is trained on made-up
words, so that it has seen none of the English ones. The fonts are matplotlib's, which corefit needs anyway.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from attrs import field, frozen, validators

from corefit import Example, hookimpl
from corefit.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.ImageFont import FreeTypeFont

HERE = Path(__file__).parent
HEIGHT, WIDTH = 32, 96
PAPER, INK = (245, 243, 235), (25, 25, 35)
MARGIN = 5
"""Pixels left of the word and right of it, before it is moved."""
MOVED = 2
"""Most pixels by which a word is moved from the center, in either direction."""
FONTS = {
    "sans": "DejaVuSans-Bold",
    "serif": "DejaVuSerif-Bold",
    "mono": "DejaVuSansMono-Bold",
    "times": "STIXGeneralBol",
    "thin": "DejaVuSans",
    "roman": "cmr10",
    "grotesque": "cmss10",
    "typewriter": "cmtt10",
}
"""The file of each font, from matplotlib's package data: DejaVu, STIX and Computer Modern."""
LENGTHS = {3: "three", 4: "four", 5: "five"}
"""The category of a word by its number of letters."""
PARTS = ("train", "validation", "heldout")
DRAWS = 2
"""How often each word is in validation.jsonl or heldout.jsonl."""

Part = Literal["train", "validation", "heldout"]


@cache
def english(part: Part) -> tuple[str, ...]:
    """The English words of a part, sorted. No word of another part has a pair of letters that no training word has."""
    every = sorted((HERE / "english.txt").read_text(encoding="utf-8").split())
    parts = {word: _part(word) for word in every}
    known = pairs(word for word in every if parts[word] == "train")
    for word in every:
        if not pairs([word]) <= known:
            parts[word] = "train"
    return tuple(word for word in every if parts[word] == part)


def _part(word: str) -> Part:
    """Three words of five are "train", one is "validation" and one "heldout"."""
    number = hashlib.sha256(word.encode()).digest()[0] % 5
    return "train" if number < 3 else "validation" if number == 3 else "heldout"


def pairs(words: Iterator[str] | list[str]) -> set[str]:
    """The pairs of letters that stand side by side in the words."""
    return {a + b for word in words for a, b in pairwise(word)}


def made_up(rng: np.random.Generator) -> str:
    """A word of 3 to 5 letters that is not in english.txt: each pair of its letters is one of a training word."""
    after = _successors()
    length = int(rng.integers(3, 6))
    while True:
        word = str(rng.choice(list(after)))
        while len(word) < length and word[-1] in after:
            word += str(rng.choice(after[word[-1]]))
        if len(word) == length and not any(word in english(part) for part in PARTS):
            return word


@cache
def _successors() -> dict[str, list[str]]:
    """The letters that follow each letter in the training words, each once, so that rare letters are common."""
    after: dict[str, list[str]] = {}
    for a, b in sorted(pairs(list(english("train")))):
        after.setdefault(a, []).append(b)
    return after


@cache
def sized(font: str, points: int) -> FreeTypeFont:
    """A font in a size."""
    import matplotlib
    from PIL import ImageFont

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{FONTS[font]}.ttf"
    if not path.is_file():
        raise DataError(
            f"the font {font!r} is missing: this matplotlib brings no {path.name}; install matplotlib from its "
            f"wheel (pip install --force-reinstall matplotlib), or take {font!r} out of the key 'fonts'"
        )
    return ImageFont.truetype(path, points)


def fitting(word: str, font: str) -> FreeTypeFont:
    """The font in the largest size in which the word, in capitals, fits between the margins."""
    points = HEIGHT
    while True:
        made = sized(font, points)
        left, top, right, bottom = made.getbbox(word.upper())
        share = min((WIDTH - 2 * MARGIN) / (right - left), (HEIGHT - 2 * MOVED - 2) / (bottom - top))
        if share >= 1:
            return made
        points = min(points - 1, int(points * share) + 1)


def draw(word: str, font: str, right: int = 0, down: int = 0) -> NDArray[np.uint8]:
    """A picture [32, 96, 3] of the word in capitals, moved from the center by a number of pixels."""
    from PIL import Image, ImageDraw

    made, text = fitting(word, font), word.upper()
    x0, y0, x1, y1 = made.getbbox(text)
    picture = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    corner = ((WIDTH - x0 - x1) / 2 + right, (HEIGHT - y0 - y1) / 2 + down)
    ImageDraw.Draw(picture).text(corner, text, INK, made)
    return np.array(picture)


def prompt(word: str) -> str:
    return f'the word "{word}"'


def meta(word: str) -> dict[str, Any]:
    return {"category": LENGTHS[len(word)]}


@frozen
class Words:
    """Pictures of one short word each, with the word in the prompt. None shows a word that is held out."""

    count: int = field(default=4096, validator=[validators.ge(1), validators.le(10_000_000)])
    """Pictures."""
    seed: int = 0
    """Other seeds give other words, fonts and places; picture i depends on the seed and i alone."""
    kind: Literal["english", "made up"] = "english"
    """The training words of english.txt, or made-up ones such as the base was trained on."""
    fonts: tuple[str, ...] = field(
        default=("sans", "serif", "mono", "times"),
        validator=[validators.min_len(1), validators.deep_iterable(validators.in_(FONTS))],
    )
    """Each picture is written in one of these; one that is named twice is twice as common."""

    def examples(self) -> Iterator[Example]:
        for i in range(self.count):
            rng = np.random.Generator(np.random.Philox(key=[self.seed, i]))
            word = made_up(rng) if self.kind == "made up" else str(rng.choice(english("train")))
            font = str(rng.choice(self.fonts))
            right, down = (int(n) for n in rng.integers(-MOVED, MOVED + 1, 2))
            yield Example(prompt(word), draw(word, font, right, down), meta(word))


def prompts(part: Part) -> Iterator[dict[str, Any]]:
    """Rows of validation.jsonl or heldout.jsonl: the words of the part in a fixed order, then again in another."""
    rng = np.random.Generator(np.random.Philox(2))
    for _ in range(DRAWS):
        for word in rng.permutation(english(part)):
            yield {"prompt": prompt(str(word)), **meta(word)}


def write_prompts() -> None:
    """Write validation.jsonl and heldout.jsonl, one JSON object a line."""
    for part in PARTS[1:]:
        lines = "".join(json.dumps(row) + "\n" for row in prompts(part))
        (HERE / f"{part}.jsonl").write_text(lines, encoding="utf-8")


@hookimpl
def corefit_sources() -> dict[str, type]:
    return {"words": Words}
