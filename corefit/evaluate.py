"""Held-out prompts, generated and scored: the same prompts from the same noise for every stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import field, frozen, validators

from corefit.data import Data, Dataset
from corefit.errors import TrainingError
from corefit.rng import Rng
from corefit.rollout import generate
from corefit.sources import Jsonl
from corefit.types import Backbone, Weighted

if TYPE_CHECKING:
    import torch
    from torch import Tensor

positive: Any = validators.gt(0)


@frozen(kw_only=True)
class Eval:
    """`[eval]`: of the base and after every stage."""

    prompts: Path
    """jsonl, as of the source of that name; `category` in it makes a column of the table."""
    reward: tuple[Weighted, ...]
    guidance: float = field(default=4.5, validator=positive)
    steps: int = field(default=40, validator=positive)
    limit: int | None = field(default=None, validator=validators.optional(positive))
    """Use the first so many prompts; all by default."""
    batch: int = field(default=16, validator=positive)
    """Samples a forward."""
    samples: int = field(default=16, validator=positive)
    """How many of them the sample grids show."""

    def data(self, size: tuple[int, int]) -> Data:
        """The prompts as prompt-only data for media of `size`."""
        return Data(source=Jsonl(self.prompts), size=size)

    def count(self, dataset: Dataset) -> int:
        """Prompts that are used."""
        return min(len(dataset), self.limit or len(dataset))


@frozen(eq=False)
class Outcome:
    """Scores of one set of weights: values metric -> [n]; the category of each prompt ("" where it has none)."""

    values: Mapping[str, Sequence[float]]
    categories: Sequence[str]


def media(
    eval: Eval, backbone: Backbone, dataset: Dataset, rows: Sequence[int], seed: int, device: torch.device
) -> Tensor:
    """Media [n, 3, H, W] in [0, 1] for prompts `rows`: a row's noise depends on the seed and its number alone."""
    import torch

    backbone.empty = dataset.null.to(device)
    batch = dataset.batch(rows, rows)
    noise = Rng((seed, "eval"), rows).randn((len(rows), *batch.shape)).to(device)
    with torch.no_grad():
        x0 = generate(backbone, noise, batch.cond.to(device), steps=eval.steps, guidance=eval.guidance)
        return backbone.decode(x0)


def score(
    eval: Eval,
    backbone: Backbone,
    dataset: Dataset,
    seed: int,
    device: torch.device,
    *,
    rows: Sequence[int] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Generate and score `rows` of the prompts, all by default."""
    rows = range(eval.count(dataset)) if rows is None else rows
    values: dict[str, list[float]] = {entry.name: [] for entry in eval.reward}
    categories: list[str] = []
    for chunk in _chunks(rows, eval.batch):
        batch = dataset.batch(chunk, chunk)
        made = media(eval, backbone, dataset, chunk, seed, device)
        for entry in eval.reward:
            values[entry.name] += _checked(entry, made, batch.prompts, batch.meta)
        categories += [str(m.get("category", "")) for m in batch.meta]
        progress(len(categories), len(rows))
    return Outcome(values, categories)


def _checked(
    entry: Weighted, made: Tensor, prompts: Sequence[str], meta: Sequence[Mapping[str, object]]
) -> list[float]:
    import torch

    scores = torch.as_tensor(entry.reward.score(made, prompts, meta)).double().cpu()
    if scores.shape != (len(prompts),) or not scores.isfinite().all():
        raise TrainingError(
            f"eval.reward: {entry.name!r} gave {tuple(scores.shape)} scores for {len(prompts)} prompts, or one that is "
            "not finite; score() must return one finite number a sample, or raise"
        )
    return scores.tolist()


def _chunks(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(rows), size):
        yield rows[first : first + size]
