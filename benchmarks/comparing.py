"""One thing written in several ways, timed in turns: the command, the ratios and their floors, the table, the JSON."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import attrs
import click
from attrs import field, frozen

from benchmarks import timing


@frozen
class Ratio:
    """Something measured over something measured, and what it may be at most."""

    name: str
    measured: timing.Spread
    target: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        return None if self.target is None else self.measured.median <= self.target


@frozen(eq=False)
class Side:
    """One way to write it: in words, and as a function that does it once."""

    says: str
    run: Callable[[], object]


@frozen
class Floor:
    """`over` may take `target` times as long as `under`, or is only compared with it."""

    over: str
    under: str
    target: float | None = None


@frozen(eq=False, kw_only=True)
class Comparison:
    """What a benchmark times.

    sides    the ways to write it, by name
    floors   the ratios of interest
    of       what is done once by each run of a side: "a step", "8 pictures"
    size     what the figures depend on besides the machine
    agrees   how far results of sides are apart that should be equal, and how far they may be
    amount   how many samples each run of a side makes, for a rate; 0 for none
    """

    sides: Mapping[str, Side]
    floors: Sequence[Floor]
    of: str
    size: Mapping[str, Any]
    agrees: Mapping[str, tuple[float, float]] = field(factory=dict[str, tuple[float, float]])
    amount: int = 0


@frozen(kw_only=True)
class Result:
    """The figures of one benchmark."""

    benchmark: str
    date: str = field(factory=lambda: date.today().isoformat())
    quick: bool
    rounds: int
    machine: Mapping[str, Any]
    of: str
    size: Mapping[str, Any]
    agrees: Mapping[str, float]
    sides: Mapping[str, Mapping[str, Any]]
    ratios: Sequence[Ratio]

    def as_json(self) -> dict[str, Any]:
        """Return the result as JSON's types, with each ratio's verdict."""
        return attrs.asdict(self) | {"ratios": [attrs.asdict(each) | {"met": each.met} for each in self.ratios]}


Build = Callable[[Path, bool], Comparison]
"""Makes the sides in a folder of their own; a tiny network where the second argument is True."""


def measure(name: str, build: Build, rounds: int, quick: bool) -> Result:
    """Time the sides in turns; ClickException if two of them should agree and do not."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        machine, compared = timing.machine(), build(Path(folder), quick)
        if wrong := {key: far for key, (far, most) in compared.agrees.items() if not far <= most}:
            raise click.ClickException(f"results differ: {wrong}; nothing is reported")
        for side in compared.sides.values():
            side.run()  # the first run also allocates, and reads what is not in memory yet
        samples = timing.interleaved(list(compared.sides), lambda side: compared.sides[side].run, progress(rounds))
    return Result(
        benchmark=name,
        quick=quick,
        rounds=rounds,
        machine=machine,
        of=compared.of,
        size=compared.size,
        agrees={key: far for key, (far, _) in compared.agrees.items()},
        sides={key: _row(side, samples[key], compared.amount) for key, side in compared.sides.items()},
        ratios=[
            Ratio(
                f"{floor.over} / {floor.under}",
                timing.ratio(samples[floor.over], samples[floor.under]),
                None if quick else floor.target,
            )
            for floor in compared.floors
        ],
    )


def _row(side: Side, samples: Sequence[timing.Sample], amount: int) -> dict[str, Any]:
    seconds = timing.Spread.of([sample.seconds for sample in samples])
    rate = {"per_second": amount / seconds.median} if amount else {}
    return {"says": side.says, "seconds": attrs.asdict(seconds), **rate}


def progress(rounds: int) -> Iterable[int]:
    """Count the rounds, with a bar on stderr."""
    from rich.console import Console
    from rich.progress import track

    return track(range(rounds), "rounds", console=Console(stderr=True), transient=True)


def command(name: str, build: Build, help: str, rounds: int) -> click.Command:
    """Make the command of a benchmark."""

    @click.command(name, help=help)
    @click.option("--rounds", default=rounds, show_default=True, type=click.IntRange(2), help="Runs of each side.")
    @click.option("--quick", is_flag=True, help="Tiny sizes: shows that it works; times mean nothing.")
    @click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there.")
    @click.option("--assert", "strict", is_flag=True, help="Exit with 1 if a floor is missed.")
    def run(rounds: int, quick: bool, path: Path | None, strict: bool) -> None:
        if not quick:
            timing.settle()
        result = measure(name, build, 2 if quick else rounds, quick)
        report(result.as_json(), path)
        show(result)
        exit_if_missed(result.ratios, strict)

    return run


def report(figures: Mapping[str, Any], path: Path | None) -> None:
    """Write the figures to `path`, if there is one."""
    if path:
        path.write_text(json.dumps(figures, indent=2) + "\n")


def exit_if_missed(ratios: Sequence[Ratio], strict: bool) -> None:
    """Exit with status 1 where a target is missed and that was asked for."""
    if strict and any(ratio.met is False for ratio in ratios):
        raise SystemExit(1)


def show(result: Result) -> None:
    """Print what each side takes, and the ratios next to their floors."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.width = max(console.width, 110)
    table = Table(title=result.of)
    rates = any("per_second" in row for row in result.sides.values())
    for heading in ("side", "", "CPU s", "quartiles", *(["per CPU s"] if rates else [])):
        table.add_column(heading, justify="left" if heading in ("side", "") else "right")
    for name, row in result.sides.items():
        s = row["seconds"]
        cells = [name, row["says"], f"{s['median']:.3f}", f"{s['low']:.3f} .. {s['high']:.3f}"]
        table.add_row(*cells, *([f"{row['per_second']:.2f}"] if rates else []))
    console.print(table, verdicts(result.ratios))
    console.print(", ".join(f"{key} {value}" for key, value in result.size.items()), f"rounds {result.rounds}")
    for key, far in result.agrees.items():
        console.print(f"{key}: differs by {far:.1e}")
    show_machine(console, result.machine)


def show_machine(console: Any, machine: Mapping[str, Any]) -> None:
    """Print what the figures were measured on."""
    console.print(
        f"{machine['cpu']}, {machine['cpus']} CPUs, load {machine['load']}, {machine['threads']} thread, "
        f"torch {machine['torch']}"
    )


def verdicts(ratios: Sequence[Ratio]) -> Any:
    """Return a table of ratios, their targets and whether they are met."""
    from rich.table import Table

    table = Table(title="ratios, medians over rounds")
    for heading in ("", "measured", "quartiles", "target", ""):
        table.add_column(heading, justify="right" if heading else "left")
    for ratio in ratios:
        m, target = ratio.measured, "" if ratio.target is None else f"<= {ratio.target}"
        verdict = {True: "pass", False: "FAIL", None: ""}[ratio.met]
        table.add_row(ratio.name, f"{m.median:.3f}", f"{m.low:.3f} .. {m.high:.3f}", target, verdict)
    return table
