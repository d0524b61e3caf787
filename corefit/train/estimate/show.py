"""What is said of estimates: a table, and a refusal where a stage cannot fit."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from corefit.errors import ConfigError
from corefit.pipeline.pipeline import Pipeline
from corefit.system.memory import size
from corefit.train import remedies
from corefit.train.estimate import search
from corefit.train.estimate.device import Device
from corefit.train.estimate.phases import MISSED, ORDER, Estimate
from corefit.train.estimate.search import Fit

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LISTED = 5
"""The most lines of a column's head; more stages than that are counted."""


def refuse(pipeline: Pipeline, found: Sequence[Estimate], device: Device, world: int = 1) -> None:
    """Raise ConfigError, with what would help, where a stage cannot fit.

    Activations, a mere estimate, do not count, but for those of a reward's gradient, which goes through the decoder:
    for clips they may be several times what a device has.
    """
    for e, stage in zip(found, pipeline.stage, strict=False):
        needed = max(e.certain, e.saved)
        if needed > device.memory:
            parts = {
                "weights": e.weights,
                "gradients": e.gradients,
                "optimizer": e.optimizer,
                "gradients being exchanged": e.exchanged,
                "copies": e.copies,
                "the decoder": e.decoder,
                "rewards": e.rewards,
                "the largest weight while it is saved": e.gathered if e.saved > e.certain else 0.0,
            }
            named = ", ".join(f"{name} {size(int(part))}" for name, part in parts.items() if part)
            helps = ", or ".join(remedies.room_helps(pipeline, stage, e, device, world))
            raise ConfigError(
                f"stage.{stage.name}: {named} are {size(int(needed))} for each process, and {device.name} has "
                f"{size(int(device.memory))}; what would help: {helps}"
            )
        if "reward_gradient" in stage.objective.uses and (e.activations or 0) > MISSED * device.memory:
            helps = ", or ".join(map(str, remedies.pipeline_ladder(pipeline, stage, world, gpu=device.gpu)))
            needed = f"{'more than' if e.beyond else 'about'} {size(int(e.activations or 0))}"
            raise ConfigError(
                f"stage.{stage.name}: the graph of a reward's gradient takes {needed}, and {device.name} has "
                f"{size(int(device.memory))}; what would help: a smaller [data] size, fewer frames"
                f"{f', or {helps}' if helps else ''}"
            )


def show(pipeline: Pipeline, found: Sequence[Estimate], device: Device, world: int = 1) -> None:
    """Print a table of the stages, and a line for each that may not fit, with what would help and is not set yet."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not found:
        console.print("memory: not known; the backbone does not say what it needs (corefit.types.Sized)")
        return
    console.print()
    print_tables(found, device, console)
    for e, stage in zip(found, pipeline.stage, strict=True):
        if e.peak > device.memory:
            phase = max(e.phases, key=lambda each: each.total, default=None)
            where = f" while {phase.name}" if phase else ""
            helps = [str(each) for each in remedies.pipeline_ladder(pipeline, stage, world, gpu=device.gpu)]
            would = f"what would help: {', or '.join(helps)}" if helps else "all keys that save memory are set"
            console.print(
                f"\n{e.stage}: with what its forwards take it may not fit{where}; {would}. "
                "corefit check --fit finds the cheapest of them",
                soft_wrap=True,
            )


def show_fit(fit: Fit, device: Device, world: int) -> None:
    """Print the keys with which a pipeline fits, what each saves and costs, and the table of the stages with them.

    Raises ConfigError where no keys let it fit.
    """
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    devices = f"{world} x " if world > 1 else ""
    room = f"{devices}{size(int(device.memory))}, of which {1 - fit.room / device.memory:.0%} stay free"
    if not fit.found:
        raise ConfigError("memory: not known; the backbone does not say what it needs (corefit.types.Sized)")
    if not fit.fits:
        raise ConfigError("\n".join(_too_large(fit, room)))
    console.print(f"\nfits into {room}{', as it is' if not fit.chosen else ' with these keys:'}\n")
    for line in search.toml(fit.chosen):
        console.print(line)
    if fit.chosen:
        console.print(f"\nor: {' '.join(f'--set {shlex.quote(setting)}' for setting in fit.settings)}\n")
        for key, saved in fit.saved.items():
            console.print(f"{key}: takes off {size(int(max(0, saved)))}")
    unknown = sorted({phase.name for e in fit.found for phase in e.phases if not phase.known})
    if unknown:
        console.print(f"not wholly known, and not counted: what forwards take while {', '.join(unknown)}")
    console.print()
    print_tables(fit.found, device, console)


def _too_large(fit: Fit, room: str) -> Iterator[str]:
    """Yield what is too large whatever is set, and what would help."""
    yield f"it does not fit into {room}, with all that is known to help: {', '.join(fit.settings) or 'nothing'}"
    for e in fit.found:
        for phase in e.phases:
            if phase.total > fit.room:
                parts = ", ".join(f"{name} {size(int(part))}" for name, part in phase.parts.items() if part)
                more = "" if phase.known else "more than "
                yield f"stage.{e.stage}: {phase.name} takes {more}{size(int(phase.total))} ({parts})"
    yield "what would help: a smaller [data] size, fewer frames, a smaller model, or more devices with shard = true"


def print_tables(found: Sequence[Estimate], device: Device, console: Console) -> None:
    """Print one table, or where it is too wide as many as it takes; none has fewer than one column of figures."""
    rows, heads = _columns(found, device)
    start = 0
    while start < len(heads):
        end = len(heads)
        options = console.options.update(width=10_000)
        while (
            end > start + 1
            and console.measure(_table(rows, heads, start, end), options=options).maximum > console.width
        ):
            end -= 1
        console.print(_table(rows, heads, start, end))
        start = end


def _columns(found: Sequence[Estimate], device: Device) -> tuple[dict[str, list[str]], list[str]]:
    """Return the rows with their cells, and the heads of the columns; stages with equal cells share a column."""
    rows = _rows(found, device)
    alike: dict[tuple[str, ...], list[int]] = {}
    for index in range(len(found)):
        alike.setdefault(tuple(cells[index] for cells in rows.values()), []).append(index)
    heads = list[str]()
    for indices in alike.values():
        names = [found[index].stage for index in indices]
        shown = names if len(names) <= LISTED else [*names[: LISTED - 1], f"and {len(names) - LISTED + 1} more"]
        heads.append("\n".join(shown))
    firsts = [indices[0] for indices in alike.values()]
    return {name: [cells[index] for index in firsts] for name, cells in rows.items()}, heads


def _table(rows: Mapping[str, Sequence[str]], heads: Sequence[str], start: int, end: int) -> Table:
    """Make a table of the columns from `start` up to `end`; rows that are zero in all columns are left out."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    made.add_column("each process")
    for head in heads[start:end]:
        made.add_column(Text(head), justify="right")
    for name, cells in rows.items():
        if any(cell != size(0) for cell in cells):
            made.add_row(name, *cells[start:end])
    return made


def _rows(found: Sequence[Estimate], device: Device) -> dict[str, list[str]]:
    """Return a row for each thing that is held, and for the most in each phase, with a cell for each stage."""
    return {
        "parameters": [count(e.parameters) for e in found],
        "that train": [count(e.trainable) for e in found],
        "weights": [size(int(e.weights)) for e in found],
        "gradients": [size(int(e.gradients)) for e in found],
        "optimizer": [size(int(e.optimizer)) for e in found],
        "exchanged gradients": [size(int(e.exchanged)) for e in found],
        "gathered weights": [size(int(e.unsharded)) for e in found],
        "average, reference, copies": [size(int(e.copies)) for e in found],
        "rows of a step": [size(int(e.kept)) for e in found],
        "decoder": [size(int(e.decoder)) for e in found],
        "rewards": [size(int(e.rewards)) for e in found],
        "activations, about": [_activations(e) for e in found],
        **_while(found),
        f"of {device.name}": [size(int(device.memory)) for _ in found],
        "main memory a machine": [size(int(e.host)) for e in found],
    }


def _activations(e: Estimate) -> str:
    """Write what a step's activations take."""
    if e.activations is None:
        return "not known"
    return f"{'more than ' if e.beyond else ''}{size(int(e.activations))}"


def _while(found: Sequence[Estimate]) -> dict[str, list[str]]:
    """Return a row for each phase; "more than" where a part of it is not known."""
    names = [name for name in ORDER if any(phase.name == name for e in found for phase in e.phases)]
    rows: dict[str, list[str]] = {}
    for name in names:
        cells = [next((p for p in e.phases if p.name == name), None) for e in found]
        rows[f"while {name}"] = [
            size(0) if p is None else f"{'' if p.known else 'more than '}{size(int(p.total))}" for p in cells
        ]
    return rows


def count(number: int) -> str:
    """Write a number of parameters in billions, millions or thousands."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)
