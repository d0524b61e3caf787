"""The `[eval]` table: how the base model and every stage are evaluated."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from attrs import field, frozen, validators

from corefit.data.settings import Data
from corefit.data.sources import Listed, prompt_source
from corefit.errors import counted
from corefit.types import ROUNDING, Featured, Reward, Weighted

positive: Any = validators.gt(0)
countable: Any = [positive, validators.le(10_000)]


def _check_some(_: object, attribute: attrs.Attribute[Any], value: Path | tuple[str, ...]) -> None:
    if value == ():
        raise ValueError(f"{attribute.name!r} must name at least one prompt, or a file of them")


@frozen(kw_only=True)
class Diversity:
    """How alike the samples of one prompt are: several are generated for each of some prompts."""

    prompts: int = field(default=16, validator=countable)
    """How many prompts to use, evenly spread over the held-out ones; repeated prompts count once."""
    samples: int = field(default=8, validator=[validators.ge(2), validators.le(10_000)])
    """How many samples to generate for each prompt, each from other noise."""
    features: str = "pixels"
    """What samples are compared by: the name of a reward of `[eval]` that has an image encoder, such as `clip_score`,
    or `pixels`: downscaled to 16 x 16, they see layout and color, but not what is shown."""


@frozen(kw_only=True)
class Drift:
    """The exposure-bias meter: how far a model's own trajectory drifts from the straight line to a real sample."""

    samples: int = field(default=64, validator=[validators.ge(2), validators.le(100_000)])
    """How many examples of the training data to measure on, evenly spread over those of the most frequent size."""
    start: float = field(default=1.0, validator=[positive, validators.le(1)])
    """The noise level at which the model takes over from the line. At 1 it starts from noise alone, which does not say
    which of a prompt's real samples is meant, and the drift is large for any model; lower levels leave the model less
    choice."""


def _check_distinct(_: object, attribute: attrs.Attribute[Any], value: Sequence[float]) -> None:
    if len(set(value)) < len(value):
        raise ValueError(f"{attribute.name!r} names {max(value, key=value.count):g} twice; remove one")


@frozen(kw_only=True)
class Also:
    """Sample some prompts once more, from the same noise, with other numbers of sampling steps and other guidance."""

    prompts: int = field(default=256, validator=countable)
    """How many prompts to use, evenly spread over the held-out ones; repeated prompts count once."""
    steps: tuple[int, ...] = field(default=(), validator=[validators.deep_iterable(countable), _check_distinct])
    """Numbers of sampling steps; by default that of `[eval]`. Each is combined with each scale of guidance."""
    guidance: tuple[float, ...] = field(default=(), validator=[validators.deep_iterable(positive), _check_distinct])
    """Scales of guidance; by default that of `[eval]`."""

    def __attrs_post_init__(self) -> None:
        if not self.steps and not self.guidance:
            raise ValueError("name 'steps' or 'guidance', such as steps = [8, 50]")


@frozen(kw_only=True)
class Eval:
    """`[eval]`: how the base model and the result of every stage are evaluated."""

    prompts: Path | tuple[str, ...] = field(validator=_check_some)
    """The held-out prompts themselves, as a list, or a file of them: a .txt with one prompt per line, .jsonl as the
    source `jsonl` reads it, a table .csv or .tsv with a header, or a .json list. GenEval, DrawBench, PartiPrompts and
    HPSv2 are published in these forms. Prompts with a `category` (GenEval's `tag`) also have a column of that name in
    the results."""
    reward: tuple[Weighted[Reward], ...] = ()
    """The rewards that score the generated samples; each has its own table in the results. Without any, the samples
    are drawn and compared, and nothing is scored."""
    seed: int = 0
    """The seed of the noise that samples are generated from, the same for all stages. It is not that of training, so
    that runs with different seeds are compared on the same noise."""
    guidance: float = field(default=4.5, validator=positive)
    """Scale of classifier-free guidance; 1 means no guidance."""
    steps: int = field(default=40, validator=countable)
    """Number of sampling steps of Euler's method, at the noise levels that the checkpoint's scheduler gives."""
    limit: int | None = field(default=None, validator=validators.optional(positive))
    """Use only this many prompts, the first of the file; by default all."""
    batch: int = field(default=16, validator=countable, metadata=ROUNDING)
    """Samples per forward pass."""
    samples: int = field(default=16, validator=countable)
    """How many prompts the sample grids show, the first of the file."""
    diversity: Diversity | None = None
    """Measure how alike the samples of one prompt are, as the metrics `vendi` and `distance`; by default not."""
    drift: Drift | None = None
    """Measure the exposure bias, as a curve over noise levels in `drift.json`; by default not."""
    also: Also | None = None
    """Score samples with other numbers of sampling steps and other guidance, too, as metrics of their own."""

    def __attrs_post_init__(self) -> None:
        name = self.diversity.features if self.diversity else "pixels"
        featured = [entry.name for entry in self.reward if isinstance(entry.value, Featured)]
        if name not in ("pixels", *featured):
            known = ", ".join(f"{each!r}" for each in ("pixels", *featured))
            raise ValueError(
                f"'diversity.features' is {name!r}, which is no reward of [eval] with features; it may be {known}"
            )

    @property
    def featured(self) -> Featured | None:
        """The reward whose features diversity is measured by; None where it is measured by pixels."""
        found = [entry.value for entry in self.reward if self.diversity and entry.name == self.diversity.features]
        return found[0] if found and isinstance(found[0], Featured) else None

    @property
    def others(self) -> Mapping[str, Eval]:
        """The settings of `also` that differ from these, by their names: "8 steps", "guidance 1", or both."""
        steps = (self.also and self.also.steps) or (self.steps,)
        scales = (self.also and self.also.guidance) or (self.guidance,)
        found: dict[str, Eval] = {}
        for number, scale in itertools.product(steps, scales):
            parts = [*([counted(number, "step")] if number != self.steps else [])]
            parts += [f"guidance {scale:g}"] if scale != self.guidance else []
            found[", ".join(parts)] = attrs.evolve(self, steps=number, guidance=scale, also=None)
        return {name: each for name, each in found.items() if name}

    @property
    def shown(self) -> int:
        """The most prompts that the sample grids can show, as far as that is known without reading a file of them."""
        listed = len(self.prompts) if isinstance(self.prompts, tuple) else self.samples
        return min(self.samples, self.limit or self.samples, listed)

    def count(self, available: int) -> int:
        """Return how many of so many prompts are used: without a reward only those that the sample grids show."""
        used = min(available, self.limit or available)
        return used if self.reward else min(used, self.samples)

    def data(self, size: tuple[int, ...]) -> Data:
        """Return the prompts as a data set without media, to be generated in `size`."""
        source = prompt_source(self.prompts) if isinstance(self.prompts, Path) else Listed(self.prompts)
        return Data(source=source, size=size)
