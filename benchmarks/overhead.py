"""What watching a run costs: the share of its time that observers, trackers, the page and meters take."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from attrs import define, field

from corefit.pipeline import read
from corefit.plugins.observing import Observers
from corefit.run import run as running
from corefit.run.events import Page
from corefit.train.meters import MetricMeans, NonFiniteGuard

DIGITS = Path(__file__).parents[1] / "examples" / "digits" / "pipeline.toml"
TARGET = 0.01
TRACKERS = "[{use='tensorboard'}, {use='wandb', mode='offline'}]"


@define
class Clock:
    """Adds up the time that each part takes within one run. A part within another one counts as the outer one alone."""

    spent: dict[str, float] = field(factory=dict[str, float])
    _inside: bool = False

    def watch(self, cls: type, method: str, part: str) -> None:
        """Measure a method from now on, in this process."""
        real: Callable[..., Any] = getattr(cls, method)

        def timed(*args: Any, **rest: Any) -> Any:
            if self._inside:
                return real(*args, **rest)
            self._inside, began = True, time.perf_counter()
            try:
                return real(*args, **rest)
            finally:
                self.spent[part] = self.spent.get(part, 0.0) + time.perf_counter() - began
                self._inside = False

        setattr(cls, method, timed)


@click.command()
@click.option("--pipeline", type=click.Path(path_type=Path), default=DIGITS, show_default="the digits example")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="As for corefit run.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the figures there as well.")
def overhead(pipeline: Path, settings: Sequence[str], file: Path | None) -> None:
    """Run a pipeline with trackers; the share of its time that watching it takes (a run of the digits example)."""
    clock = Clock()
    clock.watch(Observers, "tell", "trackers, metrics.jsonl, curves and grids")
    clock.watch(Page, "write", "run.json and the page")
    clock.watch(Page, "note", "run.json and the page")
    for cls, method in ((MetricMeans, "add"), (MetricMeans, "take"), (NonFiniteGuard, "check")):
        clock.watch(cls, method, "meters")
    os.environ.setdefault("WANDB_SILENT", "true")
    with tempfile.TemporaryDirectory() as folder:
        checked = read(pipeline, [*settings, f"out='''{folder}'''", f"observer={TRACKERS}"])
        began = time.perf_counter()
        running.run(checked)
        seconds = time.perf_counter() - began
    shares = {part: spent / seconds for part, spent in sorted(clock.spent.items())}
    for part, share in shares.items():
        click.echo(f"{part}: {clock.spent[part]:.2f} s, {share:.2%}")
    total = sum(shares.values())
    click.echo(
        f"together {total:.2%} of {seconds:.0f} s; target {TARGET:.0%}: {'met' if total <= TARGET else 'missed'}"
    )
    if file:
        file.write_text(json.dumps({"seconds": seconds, "shares": shares, "together": total}) + "\n")
