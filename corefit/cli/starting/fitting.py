"""Find the largest settings that fit into the memory of a GPU, by the estimate that `corefit check` shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import attrs
from attrs import evolve, frozen

from corefit.cli.starting.choice import Choice
from corefit.errors import ConfigError
from corefit.pipeline.pipeline import Pipeline
from corefit.system.memory import size as in_words
from corefit.train import estimate
from corefit.train.estimate import Device, Estimate

ROOM = 0.9
"""Share of a device that a step may take by the estimate; CUDA itself and fragments of free memory take the rest."""
RECOMPUTE = "gradient_checkpointing"


@frozen
class Fitted:
    """A choice, and the memory that it takes; None where that is not known."""

    choice: Choice
    estimate: Estimate | None


@frozen
class Fitting:
    """Fits choices into a device.

    pipeline_of  makes the pipeline that the file of a choice will be
    """

    device: Device
    pipeline_of: Callable[[Choice], Pipeline]

    def fit(self, sizes: Sequence[Choice]) -> Fitted:
        """Return the first of these choices that fits, the largest first, with as many rows a forward as fit.

        Gradient checkpointing is used where a size does not fit without it. ConfigError where nothing fits.
        """
        last: Estimate | None = None
        for choice in self._tried(sizes):
            last = self._estimate(choice)
            if last is None or last.activations is None:
                return Fitted(evolve(choice, recompute=self._can_recompute(choice)), last)
            if self._fits(last):
                return self._with_rows(choice, last)
        assert last is not None, "there was a size"
        raise ConfigError(self._refusal(sizes[-1], last))

    def _tried(self, sizes: Sequence[Choice]) -> Iterator[Choice]:
        for choice in sizes:
            yield choice
            if self._can_recompute(choice):
                yield evolve(choice, recompute=True)

    def _can_recompute(self, choice: Choice) -> bool:
        return RECOMPUTE in {field.name for field in attrs.fields(type(self.pipeline_of(choice).backbone))}

    def _estimate(self, choice: Choice) -> Estimate | None:
        return next(iter(estimate.estimates(self.pipeline_of(choice), self.device)), None)

    def _fits(self, found: Estimate) -> bool:
        return max(found.total, found.saved, found.read) <= ROOM * self.device.memory

    def _with_rows(self, choice: Choice, one: Estimate) -> Fitted:
        """Raise `micro` to the most rows that fit; they divide the batch. `one` is the estimate of a row."""
        fitted = Fitted(choice, one)
        rows = choice.batch
        if rows > 1:
            two = self._estimate(evolve(choice, micro=2))
            if two is None or not self._fits(two):
                return fitted
            each = max(1, (two.activations or 0) - (one.activations or 0))
            most = 1 + (ROOM * self.device.memory - one.total) / each
            while rows > most:
                rows //= 2
        while rows > 1:
            more = evolve(choice, micro=rows)
            if (found := self._estimate(more)) is not None and self._fits(found):
                return Fitted(more, found)
            rows //= 2
        return fitted

    def _refusal(self, choice: Choice, found: Estimate) -> str:
        side = " x ".join(map(str, choice.size))
        return (
            f"this model does not fit into {in_words(int(self.device.memory))}: with a LoRA, one sample of {side} at a "
            f"time and gradient checkpointing, weights and what is trained take {in_words(int(found.certain))} and "
            f"activations about {in_words(int(found.activations or 0))}, and {1 - ROOM:.0%} must stay free; name a "
            "larger --gpu or a smaller --model, or split the weights over several GPUs (shard = true, in a file that "
            "`corefit new pipeline NAME` writes)"
        )
