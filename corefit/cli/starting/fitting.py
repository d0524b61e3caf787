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
from corefit.train.estimate import ROOM, Device, Estimate, Search

RECOMPUTE = "gradient_checkpointing"
BACKBONE, TRAIN = "backbone.", "backbone.train="


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

        Gradient checkpointing is used where a size does not fit without it, and further keys where none fits with it.
        ConfigError where nothing fits.
        """
        least = self._estimate(sizes[-1], graphs=False)
        if least is None:
            return self._careful(sizes[0], None)
        found = least
        for choice in self._tried(sizes) if self._fits(least) else ():
            found = self._estimate(choice) or least
            if found.activations is None:
                return self._careful(choice, found)
            if self._fits(found):
                return self._with_rows(choice, found)
        for choice in sizes:
            if (fitted := self._with_keys(choice)) is not None:
                return fitted
        raise ConfigError(self._refusal(sizes[-1], found))

    def _with_keys(self, choice: Choice) -> Fitted | None:
        """Return a choice with the cheapest keys of [backbone] with which it fits; None where it fits with none."""

        def make(settings: Sequence[str]) -> Pipeline:
            if others := [each for each in settings if not each.startswith(BACKBONE) or each.startswith(TRAIN)]:
                raise ConfigError(f"{others[0]} is no key of a model that stays as it is")
            return self.pipeline_of(evolve(choice, keys=_lines(settings)))

        found = Search(make, self.device).fit()
        return Fitted(evolve(choice, keys=_lines(found.settings)), found.found[0]) if found.fits else None

    def _tried(self, sizes: Sequence[Choice]) -> Iterator[Choice]:
        for choice in sizes:
            yield choice
            if self._can_recompute(choice):
                yield evolve(choice, recompute=True)

    def _careful(self, choice: Choice, found: Estimate | None) -> Fitted:
        return Fitted(evolve(choice, recompute=self._can_recompute(choice)), found)

    def _can_recompute(self, choice: Choice) -> bool:
        return RECOMPUTE in {field.name for field in attrs.fields(type(self.pipeline_of(choice).backbone))}

    def _estimate(self, choice: Choice, *, graphs: bool = True) -> Estimate | None:
        return next(iter(estimate.estimates(self.pipeline_of(choice), self.device, graphs=graphs)), None)

    def _fits(self, found: Estimate) -> bool:
        return found.peak <= ROOM * self.device.memory

    def _with_rows(self, choice: Choice, one: Estimate) -> Fitted:
        """Raise `micro`, which divides the batch, as far as it fits. `one` is the estimate of a row.

        Rows hold at most as much as that times their number, so no further estimate is made: each takes seconds.
        """
        activations, rows = one.activations or 0, choice.batch
        while rows > 1 and not self._fits(evolve(one, activations=rows * activations)):
            rows //= 2
        return Fitted(evolve(choice, micro=rows), evolve(one, activations=rows * activations))

    def _refusal(self, choice: Choice, found: Estimate) -> str:
        size = " x ".join(map(str, choice.size))
        parts = {"weights": found.weights, "activations": found.activations or 0}
        parts["the rest"] = max(0, found.total - sum(parts.values()))
        named = ", ".join(f"{name} {in_words(int(part))}" for name, part in parts.items() if part)
        sample = f", for one sample of {size} at a time and with gradient checkpointing," if found.activations else ""
        return (
            f"this model does not fit into {in_words(int(self.device.memory))} ({self.device.name}), of which "
            f"{1 - ROOM:.0%} must stay free: to train a LoRA{sample} takes {in_words(int(found.total))} ({named}); "
            "name a larger --gpu, or a smaller --model"
        )


def _lines(settings: Sequence[str]) -> tuple[str, ...]:
    """Return settings of [backbone] as lines of its table."""
    return tuple(each.removeprefix(BACKBONE).replace("=", " = ", 1) for each in settings)
