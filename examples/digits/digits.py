"""Handwritten digits in colour: a source of scenes, and a judge that can tell whether a picture is right.

A scene is 16 x 16 pixels, dark, cut in 2 x 2 cells of 8 x 8; a cell is empty or holds one real handwritten
digit (scikit-learn's `load_digits`) in one of six colours. The judge has never seen the digits of the scenes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import permutations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from attrs import field, frozen, validators

from corefit import Example, hookimpl

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

COLOURS: Mapping[str, tuple[float, float, float]] = {
    "red": (1.0, 0.15, 0.15),
    "yellow": (1.0, 1.0, 0.15),
    "green": (0.15, 1.0, 0.15),
    "cyan": (0.15, 1.0, 1.0),
    "blue": (0.2, 0.2, 1.0),
    "pink": (1.0, 0.15, 1.0),
}
NUMBERS: Mapping[str, int] = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")
CATEGORIES = ("single", "two", "counting", "colours", "position")
WORDS = (*["a", "s", "and", "left", "right", "of", "above", "below"], *NUMBERS, *COLOURS, *"0123456789")
"""Every word of every prompt: the vocabulary of the base's text encoders."""

CELL, SIZE = 8, 16
DARK = 0.05
"""Brightness of the canvas, of 1."""
HELD_OUT: Mapping[str, float] = {
    "single": 0.0,
    "two": 0.25,
    "counting": 0.2,
    "colours": 0.2,
    "position": 0.25,
}
"""Share of a category's combinations that no training scene shows; 60 single digits are too few to spare any."""

Cell = tuple[int, int]
Thing = tuple[str, int]
"""A colour and a digit."""
Written = Mapping[Cell, tuple[str, "NDArray[np.float32]"]]
"""The cells that are not empty: a colour and a handwritten image [8, 8]."""
LAYOUTS = ("any", "diagonal")
"""Where the things of a scene without a relation may be; "diagonal" puts the first of two above the other, across."""
MISTAKES = ("digit", "colour", "count", "place", "swap")
"""How the rejected picture of a pair can be wrong; see `spoil`."""


@frozen
class Scene:
    """What a prompt asks for, and what a picture must show: the truth that the judge reads from meta."""

    category: str
    things: tuple[Thing, ...]
    relation: str = ""
    """Of the first thing to the second; one of RELATIONS in category position, else empty."""

    @property
    def prompt(self) -> str:
        if self.category == "counting":
            (colour, digit), number = self.things[0], list(NUMBERS)[len(self.things) - 2]
            return f"{number} {colour} {digit}s"
        return f" {self.relation or 'and'} ".join(f"a {colour} {digit}" for colour, digit in self.things)

    @property
    def meta(self) -> dict[str, Any]:
        things = [{"colour": colour, "digit": digit} for colour, digit in self.things]
        return {"category": self.category, "things": things, "relation": self.relation}

    @staticmethod
    def of(meta: Mapping[str, Any]) -> Scene:
        """The scene of `meta`, as the property made it."""
        things = tuple((str(t["colour"]), int(t["digit"])) for t in meta["things"])
        return Scene(meta["category"], things, meta["relation"])

    @property
    def is_pair(self) -> bool:
        """Whether the scene has two different things, and its prompt does not say where they are."""
        return len(set(self.things)) == 2 and not self.relation

    @property
    def held_out(self) -> bool:
        """Whether no training scene may ask for this; the same for both ways of saying one arrangement."""
        first, *rest = self.things
        relation = self.relation
        if relation in ("right of", "below"):
            relation = RELATIONS[RELATIONS.index(relation) - 1]
            first, rest = rest[0], [first]
        things = [first, *rest] if relation else sorted(self.things)
        digest = hashlib.sha256(repr((self.category, things, relation)).encode()).digest()
        return int.from_bytes(digest[:4], "big") < HELD_OUT[self.category] * 2**32


@cache
def scenes(category: str, held_out: bool) -> tuple[Scene, ...]:
    """All scenes of a category that training may show, or those that it may not; each list in a fixed order."""
    return tuple(scene for scene in _all_scenes(category) if scene.held_out == held_out)


def _all_scenes(category: str) -> Iterator[Scene]:
    things = list(product(COLOURS, range(10)))
    if category == "single":
        yield from (Scene(category, (thing,)) for thing in things)
    elif category == "counting":
        yield from (Scene(category, (thing,) * number) for thing in things for number in NUMBERS.values())
    else:
        same_digit = category == "colours"
        relations = RELATIONS if category == "position" else ("",)
        for (a, b), relation in product(product(things, things), relations):
            if a[0] != b[0] and (a[1] == b[1]) == same_digit:
                yield Scene(category, (a, b), relation)


@cache
def digit_images(part: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Handwritten digits [n, 8, 8] in [0, 1] and their classes [n]: of part "train", "judge" or "judge-test".

    One fixed split, 50 : 40 : 10 within every class; no digit is in two parts.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the digits are scikit-learn's: pip install 'corefit[examples]'") from error

    images, classes = load_digits(return_X_y=True)
    rng = np.random.Generator(np.random.Philox(8))
    chosen: list[NDArray[np.int64]] = []
    for digit in range(10):
        rows = rng.permutation(np.flatnonzero(classes == digit))
        half, tenth = round(0.5 * len(rows)), round(0.9 * len(rows))
        slices = {"train": rows[:half], "judge": rows[half:tenth], "judge-test": rows[tenth:]}
        chosen.append(slices[part])
    rows = np.concatenate(chosen)
    return (images[rows] / 16).astype(np.float32).reshape(-1, CELL, CELL), classes[rows]


def place(scene: Scene, rng: np.random.Generator, layout: str = "any") -> list[Cell]:
    """A cell (row, column) for each thing of the scene, drawn from those that satisfy its relation and the layout."""
    cells = list(product(range(2), range(2)))
    if layout == "diagonal" and scene.is_pair:
        column = int(rng.integers(2))
        return [(0, column), (1, 1 - column)]
    if not scene.relation:
        return [cells[i] for i in rng.permutation(4)[: len(scene.things)]]
    lane = int(rng.integers(2))
    across = scene.relation in ("left of", "right of")
    pair = [(lane, 0), (lane, 1)] if across else [(0, lane), (1, lane)]
    return pair if scene.relation in ("left of", "above") else pair[::-1]


def draw(scene: Scene, rng: np.random.Generator, part: str = "train") -> NDArray[np.uint8]:
    """A picture [16, 16, 3] of the scene, written with digits of `part`."""
    return paint(write(scene, rng, part))


def write(scene: Scene, rng: np.random.Generator, part: str = "train", layout: str = "any") -> Written:
    """Place the things of the scene, each written with a digit of `part`."""
    cells = place(scene, rng, layout)
    return {cell: (c, handwritten(d, rng, part)) for cell, (c, d) in zip(cells, scene.things, strict=True)}


def handwritten(digit: int, rng: np.random.Generator, part: str = "train") -> NDArray[np.float32]:
    """One of the handwritten images [8, 8] of a digit."""
    images, classes = digit_images(part)
    return images[rng.choice(np.flatnonzero(classes == digit))]


def paint(written: Written) -> NDArray[np.uint8]:
    """The picture [16, 16, 3] of what is written."""
    ink = np.zeros((SIZE, SIZE, 3), np.float32)
    for (row, column), (colour, image) in written.items():
        area = np.s_[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        ink[area] = image[..., None] * np.array(COLOURS[colour], np.float32)
    return np.round(255 * (DARK + (1 - DARK) * ink)).astype(np.uint8)


def spoil(scene: Scene, written: Written, kinds: Sequence[str], rng: np.random.Generator) -> Written:
    """The same handwriting with one mistake of a kind drawn from `kinds`, as far as the scene can have it.

    digit   one thing is another digit         colour  one thing has another colour
    count   one thing is missing, or too many  place   the two things have changed places
    swap    the two things have changed colours
    """
    distinct = scene.category in ("two", "position")
    possible = [k for k in kinds if k in ("digit", "colour", "count") or (distinct if k == "swap" else scene.relation)]
    if not possible:
        raise ValueError(f"'wrong' lists no mistake that a scene of category {scene.category!r} can have")
    kind = possible[rng.integers(len(possible))]
    wrong, cells = dict(written), list(written)
    at = cells[rng.integers(len(cells))]
    colour, image = written[at]
    if kind == "digit":
        digit = scene.things[cells.index(at)][1]
        wrong[at] = (colour, handwritten((digit + int(rng.integers(1, 10))) % 10, rng))
    elif kind == "colour":
        names = list(COLOURS)
        wrong[at] = (names[(names.index(colour) + int(rng.integers(1, 6))) % 6], image)
    elif kind == "count":
        free = [cell for cell in product(range(2), range(2)) if cell not in written]
        if free and (len(cells) == 1 or rng.integers(2)):
            wrong[free[rng.integers(len(free))]] = written[at]
        else:
            del wrong[at]
    else:
        (a, (colour_a, image_a)), (b, (colour_b, image_b)) = written.items()
        swapped = (colour_a, image_a), (colour_b, image_b)
        wrong[b], wrong[a] = swapped if kind == "place" else ((colour_a, image_b), (colour_b, image_a))
    return wrong


@frozen
class DigitScenes:
    """Scenes of the training digits, the five categories in turn; none is of a held-out combination."""

    count: int = 4096
    """Scenes."""
    seed: int = 0
    """Other seeds give other scenes; scene i depends on the seed and i alone."""
    categories: tuple[str, ...] = field(
        default=CATEGORIES, validator=validators.deep_iterable(validators.in_(CATEGORIES))
    )
    """In turn; one that is named twice has twice as many scenes."""
    wrong: tuple[str, ...] = field(default=(), validator=validators.deep_iterable(validators.in_(MISTAKES)))
    """Kinds of mistakes: each scene comes with a picture that has one of them, as its medium "rejected"."""
    layout: str = field(default="any", validator=validators.in_(LAYOUTS))
    """Where the things of a pair without a relation are; see LAYOUTS."""

    def examples(self) -> Iterator[Example]:
        for i in range(self.count):
            rng = np.random.Generator(np.random.Philox(key=[self.seed, i]))
            choices = scenes(self.categories[i % len(self.categories)], held_out=False)
            scene = choices[rng.integers(len(choices))]
            written = write(scene, rng, layout=self.layout)
            rejected = {"rejected": paint(spoil(scene, written, self.wrong, rng))} if self.wrong else {}
            yield Example(scene.prompt, paint(written), scene.meta, rejected)


def held_out_prompts(count: int = 2050) -> Iterator[dict[str, Any]]:
    """Rows of heldout.jsonl: the five categories in turn; a category begins again where it is exhausted."""
    rng = np.random.Generator(np.random.Philox(2))
    lists = [scenes(category, held_out=HELD_OUT[category] > 0) for category in CATEGORIES]
    orders = [rng.permutation(len(choices)) for choices in lists]
    for i in range(count):
        turn, kind = divmod(i, len(CATEGORIES))
        scene = lists[kind][orders[kind][turn % len(orders[kind])]]
        yield {"prompt": scene.prompt, **scene.meta}


def write_held_out(path: Path) -> None:
    """Write heldout.jsonl, one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in held_out_prompts()), encoding="utf-8")


@frozen
class Evaluator:
    """Whether a picture shows what its prompt asks for: digits, colours, count and places."""

    unit: ClassVar[str] = "share"

    strict: bool = True
    """True: 1 for a picture that is wholly right, else 0. False: the share of the facts that hold."""
    layout: str = field(default="any", validator=validators.in_(LAYOUTS))
    """With "diagonal" it is one more fact of a pair that its things are placed so."""

    def score(self, media: Tensor, prompts: Sequence[str], meta: Sequence[Mapping[str, Any]]) -> Tensor:
        """Rewards [B] for media [B, 3, 16, 16] in [0, 1]; a fact is a digit, a colour, the count, the place."""
        import torch

        if tuple(media.shape[1:]) != (3, SIZE, SIZE):
            raise ValueError(f"the judge reads media [B, 3, {SIZE}, {SIZE}], not {list(media.shape)}")
        pictures = media.detach().float().cpu().numpy().transpose(0, 2, 3, 1)
        seen = look(pictures)
        shares = [share_right(Scene.of(m), found, self.layout) for m, found in zip(meta, seen, strict=True)]
        rewards = torch.tensor(shares, dtype=torch.float32, device=media.device)
        return (rewards == 1).float() if self.strict else rewards


Found = Mapping[Cell, tuple[str | None, int | None]]
"""The cells of one picture that are not empty: colour and digit, None where unclear."""


def share_right(scene: Scene, found: Found, layout: str = "any") -> float:
    """Share in [0, 1] of the scene's facts that hold, for the kindest pairing of its things with the cells."""
    wanted = scene.things
    blanks: list[Cell | None] = [None] * max(0, len(wanted) - len(found))
    best = 0
    for cells in set(permutations([*found, *blanks], len(wanted))):
        got = [found[cell] if cell else (None, None) for cell in cells]
        right = sum((c == colour) + (d == digit) for (c, d), (colour, digit) in zip(got, wanted, strict=True))
        placed = scene.is_pair and layout == "diagonal" and _across(cells)
        best = max(best, right + placed + (bool(scene.relation) and _holds(scene.relation, cells)))
    facts = 2 * len(wanted) + 1 + bool(scene.relation) + (scene.is_pair and layout == "diagonal")
    return (best + (len(found) == len(wanted))) / facts


def _holds(relation: str, cells: Sequence[Cell | None]) -> bool:
    if cells[0] is None or cells[1] is None:
        return False
    axis = 1 if relation in ("left of", "right of") else 0
    step = cells[1][axis] - cells[0][axis]
    return step > 0 if relation in ("left of", "above") else step < 0


def _across(cells: Sequence[Cell | None]) -> bool:
    """Whether the first of two cells is above the other, and in the other column."""
    first, other = cells
    return first is not None and other is not None and (first[0], other[0]) == (0, 1) and first[1] != other[1]


def look(pictures: NDArray[np.float32]) -> list[Found]:
    """What each picture [B, 16, 16, 3] in [0, 1] shows."""
    b = len(pictures)
    cells = pictures.reshape(b, 2, CELL, 2, CELL, 3).swapaxes(2, 3).reshape(b * 4, CELL * CELL, 3)
    ink = np.clip((cells.max(2) - DARK) / (1 - DARK), 0, 1)
    ink = np.where(ink < 0.12, 0, ink)
    filled = ink.sum(1) > 2.0
    colours, digits = _colours(cells, ink), read_digits(ink)
    places = list(product(range(2), range(2)))
    return [{places[k]: (colours[i + k], digits[i + k]) for k in range(4) if filled[i + k]} for i in range(0, b * 4, 4)]


def _colours(cells: NDArray[np.float32], ink: NDArray[np.float32]) -> list[str | None]:
    """The colour of each cell [n, 64, 3]; None unless it is saturated and nearly all of the ink agrees."""
    chroma = np.clip(cells - cells.min(2, keepdims=True), 0, 1)
    waves = np.exp(1j * np.pi * np.array([0, 2 / 3, 4 / 3]))
    hue_vectors = chroma @ waves
    mean = (ink * hue_vectors).sum(1)
    named = np.array([np.array(rgb) @ waves for rgb in COLOURS.values()])
    distance = np.abs(np.angle(mean[:, None] / named))
    nearest = distance.argmin(1)
    strong = ink * (ink > 0.3)
    agrees = np.abs(np.angle(hue_vectors * np.exp(-1j * np.angle(named))[nearest, None])) < np.pi / 6
    agrees &= chroma.max(2) > 0.4 * cells.max(2)
    share = (strong * agrees).sum(1) / np.maximum(strong.sum(1), 1e-6)
    clear = (share > 0.85) & (distance.min(1) < np.pi / 9)
    names = list(COLOURS)
    return [names[k] if ok else None for k, ok in zip(nearest, clear, strict=True)]


def read_digits(ink: NDArray[np.float32]) -> list[int | None]:
    """The digit in each cell [n, 64] of ink in [0, 1]; None for what is no clear digit."""
    examples, weights = _classifier()
    votes = _kernel(_strokes(ink), examples) @ weights
    ranked = np.sort(votes, 1)
    clear = (ranked[:, -1] > 0.3) & (ranked[:, -1] - ranked[:, -2] > 0.1)
    return [int(k) if ok else None for k, ok in zip(votes.argmax(1), clear, strict=True)]


@cache
def _classifier() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Kernel ridge regression onto one-hot classes: examples [n, 64] and weights [n, 10].

    Fitted on the judge's digits, blurred and shifted a little, and on mixtures of two digits and noise, which
    vote for none. Far from all examples the kernel vanishes, so a smudge gets no vote either.
    """
    images, classes = digit_images("judge")
    rng = np.random.Generator(np.random.Philox(3))
    one_hot = np.eye(10)[classes]
    inks, votes = [images], [one_hot]
    for shift in (0, 1):
        moved = np.stack([_moved(i, rng.integers(-shift, shift + 1, 2)) for i in images])
        inks.append(np.clip(moved + rng.normal(0, 0.06, moved.shape), 0, 1))
        votes.append(one_hot)
    other = rng.permutation(len(images))
    halved = rng.random((len(images), 1, 1)) < 0.5
    mixtures = np.where(halved, _halves(images, images[other]), (images + images[other]) / 2)
    differ = classes != classes[other]
    inks.append(mixtures[differ])
    inks.append(rng.random((200, CELL, CELL)))
    votes.append(np.zeros((int(differ.sum()) + 200, 10)))
    examples = _strokes(np.concatenate(inks).reshape(-1, CELL * CELL))
    gram = _kernel(examples, examples) + 0.01 * np.eye(len(examples))
    return examples, np.linalg.solve(gram, np.concatenate(votes))


def _moved(image: NDArray[np.float32], by: NDArray[np.int64]) -> NDArray[np.float32]:
    down, right = by
    return np.pad(image, 1)[1 - down : 1 - down + CELL, 1 - right : 1 - right + CELL]


def _halves(top: NDArray[np.float32], bottom: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([top[:, : CELL // 2], bottom[:, CELL // 2 :]], axis=1)


def _strokes(ink: NDArray[np.float32]) -> NDArray[np.float64]:
    """Features [n, 64] of unit length: brightness does not count, faint strokes count more."""
    root = np.sqrt(np.clip(ink.astype(np.float64), 0, 1))
    return root / np.maximum(np.linalg.norm(root, axis=1, keepdims=True), 1e-6)


def _kernel(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-2.5 * (2 - 2 * a @ b.T))


HIDDEN, LESSONS = 128, 600
"""Width of the smooth judge's network, and the steps in which it is fitted."""


@frozen
class SmoothJudge:
    """The log-probability that a picture shows what its prompt asks for, divided by its four cells.

    A small network gives each cell's probabilities of being empty or one of 60 things; the probabilities of all
    arrangements that fit the prompt are added. In torch throughout, so that objectives can follow its gradient.
    """

    differentiable: ClassVar[bool] = True

    def score(self, media: Tensor, prompts: Sequence[str], meta: Sequence[Mapping[str, Any]]) -> Tensor:
        """Rewards [B], between -9 and 0, for media [B, 3, 16, 16] in [0, 1]."""
        import torch

        b = len(media)
        cells = media.float().reshape(b, 3, 2, CELL, 2, CELL).permute(0, 2, 4, 1, 3, 5).reshape(b, 4, -1)
        read = _read_softly(cells, [w.to(media.device) for w in _network()])
        ways = [torch.tensor(arrangements(Scene.of(m)), device=media.device) for m in meta]
        each = torch.arange(4, device=media.device)
        return torch.stack([r[each, way].sum(1).logsumexp(0) for r, way in zip(read, ways, strict=True)]) / 4


@cache
def arrangements(scene: Scene) -> list[tuple[int, ...]]:
    """All arrangements that show the scene, each as what its four cells hold: 0 for nothing, else a thing's number."""
    places, names = list(product(range(2), range(2))), list(COLOURS)
    numbers = [1 + 10 * names.index(colour) + digit for colour, digit in scene.things]
    chosen = [c for c in permutations(places, len(numbers)) if not scene.relation or _holds(scene.relation, c)]
    found = [dict(zip(cells, numbers, strict=True)) for cells in chosen]
    return sorted({tuple(f.get(cell, 0) for cell in places) for f in found})


def _read_softly(cells: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Log-probabilities [..., 61] of what cells [..., 3 * 64] hold; none is below 0.01 / 61."""
    import torch
    from torch.nn import functional as F

    first, bias, second, last = weights
    out = F.silu((2 * cells - 1) @ first + bias) @ second + last
    colours, digits, ink = out[..., :6].softmax(-1), out[..., 6:16].softmax(-1), out[..., 16:].sigmoid()
    things = (ink[..., None] * colours[..., None] * digits[..., None, :]).flatten(-2)
    return (0.99 * torch.cat([1 - ink, things], -1) + 0.01 / 61).log()


@cache
def _network() -> list[Tensor]:
    """Weights of the smooth judge's network, fitted to the judge's digits at first use: the same in every process."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are then added in one order
    rng = torch.Generator().manual_seed(5)
    with torch.inference_mode(False), torch.enable_grad():
        cells, targets = (torch.from_numpy(a) for a in _lesson(12_000))
        sizes = ((192, HIDDEN), (HIDDEN,), (HIDDEN, 17), (17,))
        weights = [torch.randn(s, generator=rng) * (s[0] ** -0.5 if len(s) == 2 else 0) for s in sizes]
        optimizer = torch.optim.AdamW([w.requires_grad_() for w in weights], 3e-3, weight_decay=0.02)
        for step in range(LESSONS):
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / LESSONS)
            rows = torch.randint(len(cells), (256,), generator=rng)
            wanted = targets[rows]
            loss = -(wanted * _read_softly(cells[rows], weights)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.set_num_threads(threads)
    return [w.detach() for w in weights]


def _lesson(count: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cells [count, 192] and what they hold [count, 61]: digits, nothing, and mixtures that are each digit alike."""
    images, classes = digit_images("judge")
    rng = np.random.Generator(np.random.Philox(4))
    one, other = rng.integers(len(images), size=(2, count))
    kind = rng.random(count)
    ink = np.stack([_moved(images[i], rng.integers(-1, 2, 2) * (rng.random() < 0.3)) for i in one])
    mixed = kind < 0.1
    ink[mixed] = (images[one] + images[other])[mixed] / 2
    faint = kind > 0.75
    ink[faint] *= rng.choice([0, 0.08], (int(faint.sum()), 1, 1))
    ink *= rng.uniform(0.8, 1.1, (count, 1, 1)).astype(np.float32)
    colour = rng.integers(6, size=count)
    pixels = DARK + (1 - DARK) * ink[:, None] * np.array([*COLOURS.values()])[colour][:, :, None, None]
    pixels = np.clip(pixels + rng.normal(0, 1, pixels.shape) * rng.choice([0.02, 0.08], (count, 1, 1, 1)), 0, 1)
    targets = np.zeros((count, 61), np.float32)
    row = np.arange(count)
    targets[row, 1 + 10 * colour + classes[one]] = 1
    targets[mixed] = 0
    targets[row[mixed, None], 1 + 10 * colour[mixed, None] + np.arange(10)] = 0.1
    targets[faint] = np.eye(61)[0]
    return pixels.reshape(count, -1).astype(np.float32), targets


@frozen
class InkJudge:
    """How much of the picture has a color that the prompt names, as far as `enough`.

    Faint digits gain by it, and there it is a sound reward. Without a limit it is easy to exploit: a canvas full of red
    scores best for every prompt with something red, and no digit can be read.
    """

    enough: float = field(default=0.2, validator=[validators.gt(0), validators.le(1)])
    """The share of the picture above which more ink earns nothing; 1 is no limit."""

    differentiable: ClassVar[bool] = True

    def score(self, media: Tensor, prompts: Sequence[str], meta: Sequence[Mapping[str, Any]]) -> Tensor:
        """Rewards [B], between 0 and `enough`, for media [B, 3, 16, 16] in [0, 1]."""
        import torch

        names = list(COLOURS)
        colours = torch.tensor([*COLOURS.values()], device=media.device)
        away = (media.float()[:, None] - colours[:, :, None, None]).abs().amax(2)
        close = 1 - away  # [B, colors, 16, 16]: 1 for a pixel of exactly that color
        asked = [sorted({names.index(c) for c, _ in Scene.of(m).things}) for m in meta]
        ink = torch.stack([c[wanted].amax(0).mean() for c, wanted in zip(close, asked, strict=True)])
        return ink.clamp(max=self.enough)


@hookimpl
def corefit_sources() -> dict[str, type]:
    return {"digits": DigitScenes}


@hookimpl
def corefit_rewards() -> dict[str, type]:
    return {"digits_judge": Evaluator, "digits_smooth_judge": SmoothJudge, "digits_ink": InkJudge}
