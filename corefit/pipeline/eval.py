"""The `[eval]` table: how the base model and every stage are evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attrs import field, frozen, validators

from corefit.data.settings import Data
from corefit.data.sources import prompt_source
from corefit.types import ROUNDING, Reward, Weighted

positive: Any = validators.gt(0)
countable: Any = [positive, validators.le(10_000)]


@frozen(kw_only=True)
class Eval:
    """`[eval]`: how the base model and the result of every stage are evaluated."""

    prompts: Path
    """The file of held-out prompts: a .txt with one prompt per line, .jsonl as the source `jsonl` does, a table .csv
    or .tsv with a header, or a .json list. GenEval, DrawBench, PartiPrompts and HPSv2 are published in these forms.
    Prompts with a `category` (GenEval's `tag`) also have a column of that name in the results."""
    reward: tuple[Weighted[Reward], ...]
    """The rewards that score the generated samples; each has its own table in the results."""
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

    def data(self, size: tuple[int, ...]) -> Data:
        """Return the prompts as a data set without media, to be generated in `size`."""
        return Data(source=prompt_source(self.prompts), size=size)
