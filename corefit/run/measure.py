"""What weights in fewer bits cost: the loss and the velocities of the frozen network against those of the whole one.

`corefit check --measure` shows it for the pipeline's own data and noise levels, before anything is trained.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from attrs import evolve, fields_dict, frozen

from corefit.data.dataset import Dataset
from corefit.errors import ConfigError, counted
from corefit.flow import interpolate, per_sample
from corefit.pipeline.pipeline import Pipeline
from corefit.rng import Rng
from corefit.rollout.loop import generate
from corefit.rollout.noise import LogitNormal
from corefit.run.prepare import encode, precision, text_dtype
from corefit.run.report import intervals
from corefit.system.display import Display
from corefit.system.memory import size
from corefit.system.ranks import Ranks, join
from corefit.train import weights
from corefit.types import Batch, Condition, Quantizable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EXAMPLES = 16
"""How many examples are measured at most, the first of the data."""
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""The noise levels are these quantiles of the first stage's noise weighting."""
DRAWS = 1024
"""How many draws the quantiles are taken from."""


@frozen(eq=False)
class Reading:
    """What one network gives for every example at every noise level.

    velocities  one tensor [levels, ...] for each example, float32 on the CPU
    bytes       those of its weights
    """

    velocities: Sequence[Tensor]
    bytes: int


@frozen(eq=False)
class Measured:
    """The network in fewer bits against the whole one, which has the dtype of the pipeline's precision.

    names    the formats: that of the whole network, and that of the one in fewer bits
    bytes    of the weights of each
    sigmas   noise levels [examples, levels]; those of different sizes of media differ in their shift
    losses   of each network: loss weight times mean square error of the velocity [examples, levels]
    moved    norm of the velocities' difference over the norm of the whole network's [examples, levels]
    prompts  of the examples
    seconds  that it took
    """

    names: tuple[str, str]
    bytes: tuple[int, int]
    sigmas: intervals.Floats
    losses: tuple[intervals.Floats, intervals.Floats]
    moved: intervals.Floats
    prompts: Sequence[str]
    seconds: float


def refuse(pipeline: Pipeline) -> None:
    """Raise ConfigError where there is nothing to measure."""
    backbone = pipeline.backbone
    bits = backbone.frozen if isinstance(backbone, Quantizable) else None
    if bits is None:
        raise ConfigError(
            "--measure compares weights in fewer bits with those of the checkpoint, and backbone.frozen is not set; "
            "try one with --set backbone.frozen=nf4"
        )
    if not pipeline.needs_media and not pipeline.eval:
        raise ConfigError(
            "--measure needs clean media, and the stages train on prompts alone; add [eval], whose steps and guidance "
            "say how to generate some"
        )


def measure(pipeline: Pipeline, display: Display | None = None) -> Measured:
    """Measure the pipeline's frozen format on its first examples; they are encoded first, if they are not cached.

    The two networks are in memory one after the other. The blocks of the whole one wait in main memory where
    the backbone has the key `offload`, because it need not fit.
    """
    refuse(pipeline)
    start, display, ranks = time.monotonic(), display or Display.on(), join(pipeline.precision)
    bits: str = cast(Any, pipeline.backbone).frozen
    with display:
        data, _ = encode(pipeline, ranks, display)
        with display.task(f"measuring {precision(ranks)}") as progress:
            whole = _loaded(pipeline, ranks, data, None)
            examples = first_examples(pipeline, data, whole, ranks.device)
            before = _read(whole, examples, ranks.device, progress)
        del whole  # before the next one is read
        _free(ranks)
        with display.task(f"measuring {bits}") as progress:
            after = _read(_loaded(pipeline, ranks, data, bits), examples, ranks.device, progress)
        _free(ranks)
    pairs = list(zip(before.velocities, after.velocities, strict=True))
    return Measured(
        names=(precision(ranks), bits),
        bytes=(before.bytes, after.bytes),
        sigmas=_stacked(each.sigma for each in examples),
        losses=(_losses(examples, before), _losses(examples, after)),
        moved=_stacked((per_sample((b - a) ** 2) / per_sample(a**2)).sqrt() for a, b in pairs),
        prompts=[each.prompt for each in examples],
        seconds=time.monotonic() - start,
    )


@frozen(eq=False)
class Example:
    """One example at every noise level: a batch [levels, ...] on the CPU, of which all rows have the same x0."""

    x0: Tensor
    noise: Tensor
    sigma: Tensor
    weight: Tensor
    cond: Condition
    prompt: str


def _loaded(pipeline: Pipeline, ranks: Ranks, data: Dataset, bits: str | None) -> Any:
    """Return a backbone of its own with the base's weights in the format `bits`, as evaluation reads them."""
    given: Any = pipeline.backbone
    waits = {"offload": "blocks"} if bits is None and "offload" in fields_dict(type(given)) else {}
    backbone: Any = evolve(given, frozen=bits, **waits)
    backbone.place(ranks.device, text_dtype(ranks))
    weights.load(backbone, ranks, frozen_in_bf16=precision(ranks) == "bf16")
    weights.prepare(backbone, ranks, evaluation=True)
    backbone.empty = data.null.to(ranks.device)
    return backbone


def _free(ranks: Ranks) -> None:
    ranks.accelerator.free_memory()
    gc.collect()


def first_examples(pipeline: Pipeline, data: Dataset, backbone: Any, device: torch.device) -> list[Example]:
    """Return the first examples. Where the data have no media, `backbone` generates them as [eval] says."""
    import torch

    noise, levels = pipeline.stage[0].noise or LogitNormal(), len(QUANTILES)
    found: list[Example] = []
    kept = sorted(int(row) for rows in data.buckets.values() for row in rows)
    for row in kept[:EXAMPLES]:
        batch, rng = data.batch([row], [row]), Rng((pipeline.seed, "measure"), [row])
        x0 = _generated(pipeline, backbone, batch, device) if batch.x0 is None else batch.x0.float()
        draws = noise.sample(DRAWS, backbone.shift(batch.shape), Rng((pipeline.seed, "measure levels"), range(DRAWS)))
        sigma = torch.quantile(draws, torch.tensor(QUANTILES))
        found.append(
            Example(
                x0.expand(levels, *x0.shape[1:]),
                rng.randn(x0.shape).expand(levels, *x0.shape[1:]),
                sigma,
                noise.weight(sigma),
                Condition.cat([batch.cond] * levels),
                batch.prompts[0],
            )
        )
    return found


def _generated(pipeline: Pipeline, backbone: Any, batch: Batch, device: torch.device) -> Tensor:
    """Return clean latents [1, ...] of one prompt, by the steps and the guidance of [eval]."""
    import torch

    assert pipeline.eval is not None, "refused before"
    noise = Rng((pipeline.seed, "measure generated"), batch.rows).randn((1, *batch.shape)).to(device)
    steps, scale = pipeline.eval.steps, pipeline.eval.guidance
    with torch.no_grad():
        return generate(backbone, noise, batch.cond.to(device), steps=steps, guidance=scale).float().cpu()


def _read(
    backbone: Any, examples: Sequence[Example], device: torch.device, progress: Callable[[int, int], None]
) -> Reading:
    import torch

    found: list[Tensor] = []
    for number, each in enumerate(examples, 1):
        x, sigma = interpolate(each.x0, each.noise, each.sigma).to(device), each.sigma.to(device)
        with torch.no_grad():
            found.append(backbone.velocity(x, sigma, each.cond.to(device)).float().cpu())
        progress(number, len(examples))
    return Reading(found, sum(p.nbytes for p in backbone.transformer.parameters()))


def _losses(examples: Sequence[Example], found: Reading) -> intervals.Floats:
    """Return w(sigma) |v - (noise - x0)|^2 [examples, levels], the loss of sft."""
    pairs = zip(examples, found.velocities, strict=True)
    return _stacked(each.weight * per_sample((v - (each.noise - each.x0)) ** 2) for each, v in pairs)


def _stacked(rows: Iterable[Tensor]) -> intervals.Floats:
    return np.stack([row.double().numpy() for row in rows])


def show(found: Measured) -> None:
    """Print a table with a row for each noise level, and one for all."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    (whole, bits), console = found.names, Console(highlight=False, markup=False)
    made = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    for title in ("noise level", f"loss, {whole}", f"loss, {bits}", "change", "95 %", "velocity"):
        made.add_column(title, justify="right", no_wrap=True)
    examples, levels = found.moved.shape
    for level in range(levels):
        made.add_row(f"{found.sigmas[:, level].mean():.3f}", *_cells(found, slice(level, level + 1)))
    made.add_row("all", *_cells(found, slice(None)))
    console.print()
    console.print(made)
    sizes = " and ".join(f"{size(count)} in {name}" for name, count in zip(found.names, found.bytes, strict=True))
    console.print(
        f"\n{counted(examples, 'example')} at {levels} noise levels, without guidance: the loss of sft, the change of "
        "its mean with an interval over examples, and the size of the velocity's difference, as a share of it. "
        f"Weights are {sizes}. It took {found.seconds:.0f} s.",
        soft_wrap=True,
    )


def _cells(found: Measured, levels: slice) -> list[str]:
    """Return the cells of some levels: the mean over examples and levels, with the interval of the paired change."""
    before, after = (each[:, levels].mean(1) for each in found.losses)
    change, whole = after - before, before.mean()
    interval = intervals.of_gain(change, intervals.labels(found.prompts), "unbounded")
    spread = f"{interval[0] / whole:+.2%} to {interval[1] / whole:+.2%}" if interval else ""
    moved = np.sqrt((found.moved[:, levels] ** 2).mean())
    return [f"{whole:.5g}", f"{after.mean():.5g}", f"{change.mean() / whole:+.2%}", spread, f"{moved:.2%}"]
