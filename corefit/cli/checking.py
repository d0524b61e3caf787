"""What `corefit check` does: a pipeline is checked without its weights, and so is whether it fits into memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from corefit.errors import plain
from corefit.pipeline.pipeline import Pipeline, read, read_unchecked


def check(pipeline: Path, settings: Sequence[str], ranks: int, memory: float | None, *, measure: bool) -> None:
    """Check a pipeline, print what its stages take, and refuse it where they do not fit.

    memory   bytes of a GPU that is planned; None for this machine's device
    measure  whether to measure what `[backbone] frozen` costs, which reads weights
    """
    checked = read(pipeline, settings)
    if measure:
        from corefit.run import measure as measuring

        measuring.refuse(checked)
    from corefit.train import estimate
    from corefit.train.estimate_cache import Kept

    device = estimate.Device.here() if memory is None else estimate.Device.of(memory)
    kept = Kept.of(checked, device, ranks)
    before = kept.read()
    found = estimate.estimates(checked, device, ranks) if before is None else before
    estimate.refuse(checked, found, device, ranks)
    if before is None:
        kept.write(found)
    _say_checked(pipeline, checked)
    estimate.show(checked, found, device, ranks)
    if measure:
        from corefit.run import measure as measuring

        measuring.show(measuring.measure(checked))


def fit(pipeline: Path, settings: Sequence[str], number: int, memory: float) -> None:
    """Check a pipeline, and print the cheapest keys with which it fits into so many GPUs of so many bytes."""
    checked = read(pipeline, settings)
    from corefit.train import estimate

    _say_checked(pipeline, checked)
    device = estimate.Device.of(memory)
    search = estimate.Search(lambda more: read_unchecked(Pipeline, pipeline, [*settings, *more]), device, number)
    found = search.fit()
    if found.fits:
        read(pipeline, [*settings, *found.settings])  # raises for keys that do not go together
    estimate.show_fit(found, device, number)


def _say_checked(pipeline: Path, checked: Pipeline) -> None:
    starts = {stage.name: f", from {stage.from_}" if stage.from_ else "" for stage in checked.stage}
    stages = ", ".join(f"{s.name} ({s.steps} steps of {s.rows}{starts[s.name]})" for s in checked.stage)
    click.echo(plain(f"{pipeline}: ok: {stages}; runs go to {checked.run_folder}"))
    if checked.data.left_out:
        click.echo(f"data: {checked.data.left_out}")
