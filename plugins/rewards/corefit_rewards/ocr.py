"""Reward `ocr`: how well a text that the prompt quotes can be read in the picture (Flow-GRPO, arXiv 2505.05470)."""

from __future__ import annotations

import re
import threading
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from attrs import field, frozen, validators

from corefit.errors import DataError, short_repr
from corefit.types import ROUNDING, Meta
from corefit_rewards.frames import FrameReward
from corefit_rewards.packages import require
from corefit_rewards.pixels import pixels, scored

if TYPE_CHECKING:
    from torch import Tensor

QUOTED = re.compile('["“”„]([^"“”„]*)["“”]')
"""A text in straight or curly double quotes."""
PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "„": '"'})
"""Curly quotes, which readers and prompts use in place of straight ones, and the straight ones."""


@frozen(slots=False)
class Ocr(FrameReward):
    """Reads the text in a picture with RapidOCR, and scores it against the text that the prompt has in quotes.

    The score is 1 - d / n, with n the number of letters of the quoted text and d the edit distance to what was read,
    but at most n; it is 1 where the text is contained in what was read. With `strict` it is 1 or 0. Spaces and case do
    not count. A prompt without quoted text is refused.
    """

    concurrent: ClassVar[bool] = True
    unit: ClassVar[Literal["", "share"]] = "share"

    target: str = "text"
    """The key of the metadata that holds the text to be read. Where a sample has it, its prompt needs no quotes."""
    confidence: float = field(default=0.5, validator=[validators.ge(0), validators.le(1)])
    """Lines that are recognized with less confidence count as not read."""
    detect: bool = True
    """Find the lines of text first. With false the whole picture is read as one line, which takes 15 ms of a core: for
    wide pictures that show one line and little else."""
    strict: bool = False
    """Score 1 where exactly the text was read, and 0 otherwise."""
    threads: int = field(default=4, validator=[validators.ge(1), validators.le(1000)], metadata=ROUNDING)
    """How many pictures are read at once, each on one CPU core. It changes no score."""

    def check(self) -> None:
        """Raise ConfigError if RapidOCR is not installed; its models are inside the package."""
        require("rapidocr_onnxruntime")

    def score_pictures(self, pictures: Tensor, prompts: Sequence[str], meta: Sequence[Meta]) -> Tensor:
        """Return scores [B] from 0 to 1; raise DataError for a prompt that quotes no text."""
        wanted = [self._target(prompt, one) for prompt, one in zip(prompts, meta, strict=True)]

        def similarities(rows: Sequence[int]) -> list[float]:
            read = self._readers.read(pixels(pictures[rows]))
            score = same if self.strict else similarity
            return [score(text, wanted[row]) for row, text in zip(rows, read, strict=True)]

        return scored(pictures, similarities)

    def _target(self, prompt: str, meta: Meta) -> str:
        """Return the text that should be in the picture."""
        if self.target in meta:
            text = meta[self.target]
            if not isinstance(text, str) or not normalized(text):
                raise DataError(
                    f"reward 'ocr': the metadata {self.target!r} of the prompt {short_repr(prompt)} is "
                    f"{short_repr(text)}; give the text that should be read"
                )
            return text
        text = quoted(prompt)
        if not normalized(text or ""):
            raise DataError(
                f"reward 'ocr': the prompt {short_repr(prompt)} has no text in double quotes; quote the text that "
                f"should be read, or give it as {self.target!r} in the metadata"
            )
        return text or ""

    @cached_property
    def _readers(self) -> _Readers:
        self.check()
        return _Readers(self.threads, self.confidence, self.detect)


def quoted(prompt: str) -> str | None:
    """Return the first text in double quotes, straight or curly, or None."""
    found = QUOTED.search(prompt)
    return found[1] if found else None


def normalized(text: str) -> str:
    """Return a text in lower case and without spaces, in which equal letters are equal characters."""
    return "".join(unicodedata.normalize("NFKC", text.translate(PLAIN)).lower().split())


def similarity(read: str, target: str) -> float:
    """Return 1 - d / n from 0 to 1: 1 where `target` is in `read`, 0 where they have nothing in common.

    n is the number of letters of `target`, and d the edit distance, at most n. Spaces and case do not count.
    """
    read, target = normalized(read), normalized(target)
    distance = 0 if target in read else min(edit_distance(read, target), len(target))
    return 1 - distance / len(target)


def same(read: str, target: str) -> float:
    """Return 1 where `read` is `target` but for spaces and case, and 0 where it is not."""
    return float(normalized(read) == normalized(target))


def edit_distance(one: str, other: str) -> int:
    """Return the least number of insertions, deletions and replacements of characters that turn `one` into `other`."""
    above = list(range(len(other) + 1))
    for row, a in enumerate(one, 1):
        here = [row]
        for column, b in enumerate(other, 1):
            here.append(min(above[column] + 1, here[-1] + 1, above[column - 1] + (a != b)))
        above = here
    return above[-1]


def in_reading_order(words: Sequence[tuple[Any, str]]) -> list[tuple[Any, str]]:
    """Sort texts by lines from top to bottom, and within a line from left to right.

    A text is on the line of the one above it if its center is above that one's lower edge.

    words  (corners [4, 2], text)
    """
    lines: list[list[tuple[Any, str]]] = []
    for word in sorted(words, key=lambda word: _extent(word[0], 1)[1]):
        low, high = _extent(word[0], 1)
        if lines and (low + high) / 2 < _extent(lines[-1][0][0], 1)[1]:
            lines[-1].append(word)
        else:
            lines.append([word])
    return [word for line in lines for word in sorted(line, key=lambda word: _extent(word[0], 0)[0])]


def _extent(corners: Any, axis: int) -> tuple[float, float]:
    """Return the least and the largest coordinate of corners [4, 2]; axis 0 is x, 1 is y."""
    return min(corner[axis] for corner in corners), max(corner[axis] for corner in corners)


class _Readers:
    """Threads that read pictures, each with engines of its own, for RapidOCR keeps state while it reads."""

    def __init__(self, threads: int, confidence: float, detect: bool) -> None:
        self._pool = ThreadPoolExecutor(threads, "ocr")
        self._own = threading.local()
        self._confidence = confidence
        self._detect = detect

    def read(self, pictures: Any) -> list[str]:
        """Return the text in each picture of an array [B, H, W, 3] of bytes; "" where there is none."""
        return list(self._pool.map(self._read, pictures))

    def _read(self, picture: Any) -> str:
        if not hasattr(self._own, "engine"):
            self._own.engine = _engine(self._confidence)
        picture = picture[:, :, ::-1]  # OpenCV's order of channels is BGR
        lines, _ = self._own.engine(picture, use_det=self._detect, use_cls=False)
        if not self._detect:  # then RapidOCR gives no corners, and lines of any confidence
            return "".join(text for text, confidence in lines or () if confidence >= self._confidence)
        return "".join(text for _, text in in_reading_order([(box, text) for box, text, _ in lines or ()]))


def _engine(confidence: float) -> Any:
    """Return RapidOCR, which computes in the thread that calls it."""
    import cv2
    from rapidocr_onnxruntime import RapidOCR

    cv2.setNumThreads(1)
    return RapidOCR(text_score=confidence, intra_op_num_threads=1, inter_op_num_threads=1)
