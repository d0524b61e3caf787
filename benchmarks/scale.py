"""How the cost of a step grows with points, paths, batch, latents, group and processes: a line, and its constant.

The theory: a SOAR step needs the network once for the sample, once for the empty prompt, and once for each correction
point of each path; all of it is proportional to the batch. So the cost is a constant (the optimizer's step, and what
the terms share) and a slope. For latents of other sizes the axis is the number of operations, which torch counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click
import numpy as np
from attrs import frozen

from benchmarks import comparing, timing

if TYPE_CHECKING:
    from benchmarks.soar_variants import Size

TARGET = 0.1
"""The share of a cost by which it may lie off the line."""
STEPS = 3
"""Timed steps of each process."""


@frozen(eq=False)
class Axis:
    """What is varied, the amounts on the axis, and the step for each value of it."""

    says: str
    steps: Mapping[int, Callable[[], object]]
    amounts: Sequence[float]


@frozen(kw_only=True)
class Line:
    """What was found for one axis.

    seconds   CPU seconds of a step for each value, medians
    slope     seconds for each unit of the axis
    constant  seconds where the axis is 0, and `share` its share of the smallest step
    off       how far a value lies off the line at most, as a share of its own cost
    """

    says: str
    values: Sequence[int]
    seconds: Sequence[float]
    slope: float
    constant: float
    share: float
    off: float
    met: bool | None

    @staticmethod
    def of(says: str, values: Sequence[int], amounts: Sequence[float], seconds: Sequence[float], judged: bool) -> Line:
        """Fit a line whose relative errors are least."""
        x, y = np.array(amounts, float), np.array(seconds, float)
        slope, constant = (float(each) for each in np.polyfit(x, y, 1, w=1 / y))
        off = float(np.max(np.abs(slope * x + constant - y) / y))
        share = constant / float(y.min())
        met = off <= TARGET if judged else None
        found = [float(each) for each in y]
        fitted = {"slope": slope, "constant": constant, "share": share, "off": off}
        return Line(says=says, values=values, seconds=found, met=met, **fitted)


def _sizes(quick: bool) -> tuple[Size, Sequence[int], Sequence[int]]:
    """The network, and the sides of latents and the batches that are tried."""
    from benchmarks.soar_variants import QUICK, Size

    if quick:
        return QUICK, (4, 8), (2, 4)
    return Size(layers=4, heads=6, latents=16, tokens=64, batch=4), (8, 16, 24, 32), (2, 4, 8)


def _points(quick: bool, folder: Path) -> Axis:
    return _soar("correction points", quick, lambda n: {"points": n}, (1, 2, 4, 8))


def _paths(quick: bool, folder: Path) -> Axis:
    return _soar("paths, of two points each", quick, lambda n: {"points": 2, "paths": n}, (1, 2, 4))


def _soar(says: str, quick: bool, keys: Callable[[int], dict[str, int]], values: Sequence[int]) -> Axis:
    from benchmarks.soar_variants import Bench, corefit_step
    from corefit_soar.objective import Soar

    bench = Bench.of(_sizes(quick)[0])
    return Axis(says, {n: corefit_step(Soar(chunk=1, **keys(n)))(bench) for n in values}, values)


def _batch(quick: bool, folder: Path) -> Axis:
    size, _, batches = _sizes(quick)
    return Axis("batch, of SFT", {n: _sft(attrs.evolve(size, batch=n)) for n in batches}, batches)


def _latents(quick: bool, folder: Path) -> Axis:
    size, sides, _ = _sizes(quick)
    each = {n: attrs.evolve(size, latents=n) for n in sides}
    says = "side of the latents, of SFT; the axis has the operations"
    return Axis(says, {n: _sft(size) for n, size in each.items()}, [_operations(size) for size in each.values()])


def _sft(size: Size) -> Callable[[], object]:
    from benchmarks.soar_variants import Bench, corefit_step
    from corefit_sft import Sft

    return corefit_step(Sft())(Bench.of(size))


def _operations(size: Size) -> float:
    """Operations of a forward and a backward, in units of 10^9; products of matrices and attention alone."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        cond = size.condition(size.batch).tensors
        v = size.transformer()(
            hidden_states=torch.randn(size.batch, 16, size.latents, size.latents),
            timestep=torch.ones(size.batch),
            encoder_hidden_states=cond["prompt_embeds"],
            pooled_projections=cond["pooled"],
            return_dict=False,
        )[0]
        v.sum().backward()
    return counter.get_total_flops() / 1e9


def _group(quick: bool, folder: Path) -> Axis:
    from benchmarks import subject
    from corefit.samplers import FlowSde
    from corefit.types.stage import Optimizer, Stage
    from corefit_flow_grpo import FlowGrpo

    backbone, values = subject.backbone(folder, quick), (2, 4) if quick else (2, 4, 8)
    data = subject.dataset(folder, backbone, subject.Prompts(4), media=False)
    steps: dict[int, Callable[[], object]] = {}
    for n in values:
        stage = Stage(
            name="benchmark",
            steps=10**6,
            objective=FlowGrpo(group=n, steps=3, guidance=1.0),
            sampler=FlowSde(),
            reward=subject.BRIGHT,
            batch=n,
            optimizer=Optimizer(lr=subject.LR),
        )
        loop = subject.loop(folder, attrs.evolve(backbone), data, stage)
        batch = subject.first_batch(loop)
        steps[n] = lambda loop=loop, batch=batch: loop.take_step(batch)
    return Axis("rollouts in a group, of Flow-GRPO", steps, values)


AXES: Mapping[str, Callable[[bool, Path], Axis]] = {
    "points": _points,
    "paths": _paths,
    "batch": _batch,
    "latents": _latents,
    "group": _group,
}
PROCESSES = "processes"


@click.command("scale")
@click.option("--rounds", default=4, show_default=True, type=click.IntRange(2), help="Steps of each value.")
@click.option("--quick", is_flag=True, help="Tiny sizes: shows that it works; times mean nothing.")
@click.option("--only", multiple=True, type=click.Choice([*AXES, PROCESSES]), help="Only these.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there.")
@click.option("--assert", "strict", is_flag=True, help="Exit with 1 if a cost is not linear.")
def scale(rounds: int, quick: bool, only: Sequence[str], path: Path | None, strict: bool) -> None:
    """How a step's cost grows with points, paths, batch, latents, group and processes (6 minutes)."""
    import torch

    if not quick:
        timing.settle()
    torch.set_num_threads(1)
    chosen, lines = only or [*AXES, PROCESSES], dict[str, Line]()
    for name in [name for name in AXES if name in chosen]:
        with tempfile.TemporaryDirectory() as folder:
            lines[name] = _line(AXES[name](quick, Path(folder)), 2 if quick else rounds, not quick)
    processes = _processes(quick) if PROCESSES in chosen else {}
    _show(lines, processes)
    found = {name: attrs.asdict(line) for name, line in lines.items()}
    figures = {"benchmark": "scale", "quick": quick, "machine": timing.machine(), "lines": found, **processes}
    comparing.report(figures, path)
    if strict and any(line.met is False for line in lines.values()):
        raise SystemExit(1)


def _line(axis: Axis, rounds: int, judged: bool) -> Line:
    """Time the values of an axis in turns."""
    for step in axis.steps.values():
        step()
    names = {str(value): step for value, step in axis.steps.items()}
    samples = timing.interleaved([*names], names.__getitem__, comparing.progress(rounds))
    seconds = [timing.Spread.of([s.seconds for s in samples[name]]).median for name in names]
    return Line.of(axis.says, [*axis.steps], axis.amounts, seconds, judged)


def _processes(quick: bool) -> dict[str, Any]:
    """CPU seconds of a step of the same batch, by all processes together, with one process and with two."""
    found: dict[str, float] = {}
    for world in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world))
            command = [sys.executable, *launcher, "-m", "benchmarks.scale", folder, str(int(quick))]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, cwd=Path(__file__).parents[1], env=environment)
            found[str(world)] = sum(json.loads(file.read_text()) for file in Path(folder).glob("*.json"))
    return {PROCESSES: {"seconds": found, "ratio": found["2"] / found["1"]}}


def worker(folder: Path, quick: bool) -> None:
    """Take steps of SFT as one process of several, and write how many CPU seconds one of them takes."""
    import torch

    from benchmarks.soar_variants import Bench, loop_of
    from corefit_sft import Sft

    torch.set_num_threads(1)
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    size = _sizes(quick)[0]
    rows = size.batch // world
    bench = Bench.of(attrs.evolve(size, batch=rows))
    loop, batch = loop_of(Sft(), bench), attrs.evolve(bench.inputs.batch, rows=range(rank * rows, (rank + 1) * rows))
    loop.take_step(batch)
    began = time.process_time()
    for _ in range(STEPS):
        loop.take_step(batch)
    (folder / f"{rank}.json").write_text(json.dumps((time.process_time() - began) / STEPS))


def _show(lines: Mapping[str, Line], processes: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console, table = Console(), Table(title="CPU seconds of a step")
    console.width = max(console.width, 120)
    for heading in ("", "values", "seconds", "constant", "of the smallest", "off the line", ""):
        table.add_column(heading)
    for line in lines.values():
        verdict = {True: "pass", False: "FAIL", None: ""}[line.met]
        values, seconds = (", ".join(each) for each in (map(str, line.values), (f"{s:.3f}" for s in line.seconds)))
        cells = (f"{line.constant:.3f}", f"{line.share:.0%}", f"{line.off:.1%}, <= {TARGET:.0%}")
        table.add_row(line.says, values, seconds, *cells, verdict)
    console.print(table)
    for each in processes.values():
        one, two = each["seconds"]["1"], each["seconds"]["2"]
        console.print(f"a step of SFT by 1 process {one:.3f} CPU s, by 2 {two:.3f} together: {each['ratio']:.3f}")


if __name__ == "__main__":
    worker(Path(sys.argv[1]), sys.argv[2] == "1")
