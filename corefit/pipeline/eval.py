"""What a pipeline says of how the base and every stage are judged."""

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
    """`[eval]`: of the base and after every stage."""

    prompts: Path
    """A .txt with a prompt a line, or jsonl as of the source of that name, where `category` makes a table's column."""
    reward: tuple[Weighted[Reward], ...]
    """Rewards that score what is generated."""
    guidance: float = field(default=4.5, validator=positive)
    """Scale of classifier-free guidance; 1 is none."""
    steps: int = field(default=40, validator=countable)
    """Sampling steps, of Euler's method on the checkpoint's own noise levels."""
    limit: int | None = field(default=None, validator=validators.optional(positive))
    """Use the first so many prompts; all by default."""
    batch: int = field(default=16, validator=countable, metadata=ROUNDING)
    """Samples a forward."""
    samples: int = field(default=16, validator=countable)
    """How many of them the sample grids show."""

    def data(self, size: tuple[int, ...]) -> Data:
        """The prompts as prompt-only data for media of `size`."""
        return Data(source=prompt_source(self.prompts), size=size)
