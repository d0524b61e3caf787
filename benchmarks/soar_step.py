"""One SOAR step of corefit against SFT's activations, the bare floor's time, and the published step's time."""

from __future__ import annotations

import gc
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click
from attrs import field, frozen

from benchmarks import activations, comparing, timing
from benchmarks.comparing import Ratio

if TYPE_CHECKING:
    import torch

    from benchmarks.soar_variants import Bench, Size

AGREE = 1e-4
SAME = ("soar", "soar 3", "soar 6", "published", "published, kept")
"""Variants whose gradient is the floor's."""


@frozen(kw_only=True)
class Row:
    """What one variant costs. Bytes are peaks of one step; rss is over weights, optimizer and gradients."""

    says: str
    seconds: timing.Spread
    faults: int
    activations: int
    rss: int | None


@frozen(kw_only=True)
class Result:
    benchmark: str = "soar_step"
    date: str = field(factory=lambda: date.today().isoformat())
    quick: bool
    rounds: int
    machine: dict[str, Any]
    parameters: int
    gradients: dict[str, float]
    """Name -> largest relative difference of its gradient from the floor's."""
    variants: dict[str, Row]
    ratios: list[Ratio]


@click.command("soar_step")
@click.option("--rounds", default=6, show_default=True, type=click.IntRange(1), help="Timed steps of each variant.")
@click.option(
    "--quick", is_flag=True, help="A tiny network and two rounds: shows that it works; its times mean nothing."
)
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here too.")
@click.option("--assert", "strict", is_flag=True, help="Exit with 1 if a target is missed.")
def soar_step(rounds: int, quick: bool, path: Path | None, strict: bool) -> None:
    """Memory and time of a SOAR step against SFT, a plain loop, and the published step."""
    timing.settle()
    result = measure(2 if quick else rounds, quick)
    comparing.report(as_json(result), path)
    show(result)
    comparing.exit_if_missed(result.ratios, strict)


def measure(rounds: int, quick: bool) -> Result:
    """All figures; ClickException if the variants do not compute the same gradient."""
    import torch

    from benchmarks.soar_variants import FULL, QUICK, VARIANTS, Bench

    torch.set_num_threads(1)
    machine, size = timing.machine(), QUICK if quick else FULL
    gc.freeze()  # what imports left is not looked through before each step
    # before this process owns much: a fork leaves its pages to be copied when next written to
    rss = {name: activations.alone(_rss, size, name) for name in VARIANTS}
    bench = Bench.of(size)
    differences, kept = _first_steps(bench)
    timing.reserve(2 * max(kept.values()))
    samples = timing.interleaved(list(VARIANTS), bench.ready, comparing.progress(rounds))
    rows = {
        name: Row(
            says=variant.says,
            seconds=timing.Spread.of([s.seconds for s in samples[name]]),
            faults=int(timing.Spread.of([s.faults for s in samples[name]]).median),
            activations=kept[name],
            rss=rss[name],
        )
        for name, variant in VARIANTS.items()
    }
    return Result(
        quick=quick,
        rounds=rounds,
        machine=machine,
        parameters=sum(p.numel() for p in bench.transformer.parameters()),
        gradients=differences,
        variants=rows,
        ratios=_ratios(rows, samples, quick),
    )


def _ratios(rows: dict[str, Row], samples: dict[str, list[timing.Sample]], quick: bool) -> list[Ratio]:
    def memory(over: str, under: str, target: float | None = None) -> Ratio:
        value = rows[over].activations / rows[under].activations
        return Ratio(f"activations: {over} / {under}", timing.Spread.of([value]), target)

    def time(over: str, under: str, target: float | None = None) -> Ratio:
        target = None if quick else target
        return Ratio(f"time: {over} / {under}", timing.ratio(samples[over], samples[under]), target)

    return [
        memory("soar", "sft", 1.05),
        time("soar", "floor", 1.05),
        time("soar", "published", 0.72),
        time("soar 3", "published"),
        time("soar 6", "published"),
        time("soar", "published, kept"),
        memory("published, kept", "soar"),
        time("soar", "sft"),
    ]


def _first_steps(bench: Bench) -> tuple[dict[str, float], dict[str, int]]:
    """One step of each, untimed: how far its gradient is from the floor's, and its peak activations."""
    from benchmarks.soar_variants import VARIANTS

    differences: dict[str, float] = {}
    kept: dict[str, int] = {}
    expected = None
    for name in VARIANTS:
        with activations.Activations.of(bench.transformer).watch() as watched:
            gradients = _gradients(bench, name)
        kept[name] = watched.peak
        expected = gradients if name == "floor" else expected
        if name in SAME:
            assert expected is not None, "the floor comes first"
            differences[name] = difference(gradients, expected)
    if wrong := {name: d for name, d in differences.items() if not d < AGREE}:
        raise click.ClickException(
            f"gradients differ from the floor's by more than {AGREE}: {wrong}; nothing is reported"
        )
    return differences, kept


def _gradients(bench: Bench, name: str) -> list[torch.Tensor]:
    """Run a step; the gradients that its optimizer was about to use."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    step = bench.ready(name)
    seen: list[torch.Tensor] = []
    hook = register_optimizer_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in bench.transformer.parameters())
    )
    step()
    hook.remove()
    return seen


def difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest difference of an entry, over its tensor's largest entry.

    Tensors 10,000 times smaller than the largest count as that: key biases, whose gradient is 0 but for rounding.
    """
    least = 1e-4 * max(float(e.abs().max()) for e in expected)
    return max(
        float((f - e).abs().max()) / max(float(e.abs().max()), least) for f, e in zip(found, expected, strict=True)
    )


def _rss(size: Size, name: str) -> int | None:
    """In a process of its own: resident memory that a step needs besides weights, optimizer and gradients."""
    from benchmarks.soar_variants import Bench

    bench = Bench.of(size)
    bench.ready(name)()
    peak = activations.peak_rss(bench.ready(name))
    return None if peak is None else peak - sum(p.numel() * 4 for p in bench.transformer.parameters())


def as_json(result: Result) -> dict[str, Any]:
    """The result as JSON's types, with each ratio's verdict."""
    return attrs.asdict(result) | {"ratios": [attrs.asdict(r) | {"met": r.met} for r in result.ratios]}


def show(result: Result) -> None:
    """Two tables: what each variant costs, and the ratios next to their targets."""
    from rich.console import Console

    console, machine = Console(), result.machine
    console.width = max(console.width, 110)
    console.print(_costs(result), comparing.verdicts(result.ratios))
    console.print(
        f"{result.parameters / 1e6:.1f}M parameters, {result.rounds} interleaved rounds, {machine['threads']} thread, "
        f"gradients agree to {max(result.gradients.values()):.1e}"
    )
    comparing.show_machine(console, machine)


def _costs(result: Result) -> Any:
    from rich.table import Table

    table = Table(title="one step")
    for heading in ("variant", "", "CPU s", "quartiles", "activations", "peak RSS", "page faults"):
        table.add_column(heading, justify="left" if heading in ("variant", "") else "right")
    for name, row in result.variants.items():
        s = row.seconds
        rss = "-" if row.rss is None else _mb(row.rss)
        quartiles = f"{s.low:.3f} .. {s.high:.3f}"
        table.add_row(name, row.says, f"{s.median:.3f}", quartiles, _mb(row.activations), rss, str(row.faults))
    return table


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
