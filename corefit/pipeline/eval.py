"""The `[eval]` table: how the base model and every stage are evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
from attrs import field, frozen, validators

from corefit.data.settings import Data
from corefit.data.sources import Listed, prompt_source
from corefit.types import ROUNDING, Reward, Weighted

positive: Any = validators.gt(0)
countable: Any = [positive, validators.le(10_000)]


def _check_some(_: object, attribute: attrs.Attribute[Any], value: Path | tuple[str, ...]) -> None:
    if value == ():
        raise ValueError(f"{attribute.name!r} must name at least one prompt, or a file of them")


@frozen(kw_only=True)
class Eval:
    """`[eval]`: how the base model and the result of every stage are evaluated."""

    prompts: Path | tuple[str, ...] = field(validator=_check_some)
    """The held-out prompts themselves, as a list, or a file of them: a .txt with one prompt per line, .jsonl as the
    source `jsonl` does, a table .csv or .tsv with a header, or a .json list. GenEval, DrawBench, PartiPrompts and HPSv2
    are published in these forms. Prompts with a `category` (GenEval's `tag`) also have a column of that name in the
    results."""
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

    def count(self, available: int) -> int:
        """Return how many of so many prompts are used: without a reward only those that the sample grids show."""
        used = min(available, self.limit or available)
        return used if self.reward else min(used, self.samples)

    def data(self, size: tuple[int, ...]) -> Data:
        """Return the prompts as a data set without media, to be generated in `size`."""
        source = prompt_source(self.prompts) if isinstance(self.prompts, Path) else Listed(self.prompts)
        return Data(source=source, size=size)
