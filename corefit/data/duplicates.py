"""Counts the held-out prompts that training sees, too: scores on them say little about prompts that are new."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from corefit.data.dataset import Dataset


def fingerprint(prompt: str) -> str:
    """Return a short hash of a prompt, the same for prompts that differ in case and white space alone."""
    return hashlib.sha256(" ".join(prompt.casefold().split()).encode()).hexdigest()[:16]


def duplicates(training: Dataset, held_out: Dataset, count: int) -> int | None:
    """Return how many of the first `count` held-out prompts are captions of the examples that training keeps.

    None means that a cache of corefit 0.1, which has no fingerprints of its prompts, does not tell.
    """
    seen, asked = training.fingerprints(), held_out.fingerprints()
    if seen is None or asked is None:
        return None
    captions = {each for of_example in seen for each in of_example}
    return sum(first in captions for first, *_ in asked[:count])
