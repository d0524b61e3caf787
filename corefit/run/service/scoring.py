"""Scores the samples of requests with one reward; an error is the result of the sample that it came from."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from corefit.types import Reward, Weighted, blame, rewards
from corefit.types.wire import Result, Sample

if TYPE_CHECKING:
    import torch


@frozen(eq=False)
class Scorer:
    """Calls a reward for the samples of requests.

    device  where the media are put
    """

    entry: Weighted[Reward]
    device: torch.device

    def results(self, samples: Sequence[Sample]) -> list[Result]:
        """Return the results of samples, in their order; those of one size are scored in one call of the reward."""
        found: dict[int, Result] = {}
        for numbers in _by_size(samples):
            scored = self._scored([samples[number] for number in numbers])
            found.update(zip(numbers, scored, strict=True))
        return [found[number] for number in range(len(samples))]

    def _scored(self, samples: Sequence[Sample]) -> list[Result]:
        """Score samples of one size; if the call fails, each is tried alone, so that one does not spoil the others."""
        try:
            scores = self._scores(samples)
        except Exception as error:
            if len(samples) == 1:
                return [Result(samples[0].id, error=_described(error))]
            return [result for one in samples for result in self._scored([one])]
        return [
            Result(one.id, score) if math.isfinite(score) else Result(one.id, error=f"its score is {score}")
            for one, score in zip(samples, scores, strict=True)
        ]

    def _scores(self, samples: Sequence[Sample]) -> list[float]:
        import torch

        media = torch.stack([one.media for one in samples]).to(self.device).float() / 255
        prompts, meta = [one.prompt for one in samples], [one.meta for one in samples]
        with torch.no_grad(), blame.no_exit():
            return rewards.score(self.entry, media, prompts, meta).tolist()


def _by_size(samples: Sequence[Sample]) -> Iterator[list[int]]:
    """Yield the numbers of the samples of each size."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, one in enumerate(samples):
        groups.setdefault(tuple(one.media.shape), []).append(number)
    yield from groups.values()


def _described(error: Exception) -> str:
    """Return an error with the file and the line that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
