"""`corefit compare --seeds`: runs that differ in their seed alone, as one table of means over the seeds.

Everything is read from the folders of the runs, or from what an earlier comparison has kept of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve

from corefit.errors import ConfigError, near
from corefit.run import report
from corefit.run.evaluation import records, replicates
from corefit.run.evaluation.compare import LONGEST, refuse_run
from corefit.run.evaluation.replicates import Replicate, Source
from corefit.run.report import seeds, seeds_table
from corefit.run.report.forest import drift_curves, forest
from corefit.run.report.page import is_run
from corefit.run.report.page.folder import STAGE
from corefit.run.report.page.memo import Memo
from corefit.system import files
from corefit.system.display import Display


def compare_seeds(places: Sequence[Path], over: str, out: Path | None, display: Display) -> Path:
    """Compare the stages of the runs, or kept results, in `places`; return the folder with what was written.

    Raises ConfigError where they are no replicates of each other, and DataError where a file is damaged.

    over  a stage over which all others have a gain; "" for none
    """
    places = [*{place.resolve(): place for place in places}.values()]
    memo = Memo()
    read = [records.read(place) if _is_kept(place) else _run(place, memo, display) for place in places]
    sources = [source for source in read if source]
    if not sources:
        raise ConfigError(f"nothing is evaluated yet in {', '.join(map(str, places))}; compare runs with [eval]")
    replicates.refuse_unlike(sources)
    folder = _output(out, places)
    for line in replicates.differences(sources):
        display.print(line)
    found = _joined(sources)
    _refuse_over(over, found)
    metrics, left_out = _metrics(found.replicates)
    for line in left_out:
        display.print(line)
    _write(folder, found, metrics, over, display)
    return folder


def _is_kept(place: Path) -> bool:
    return (place / records.DATA).is_file()


def _run(place: Path, memo: Memo, display: Display) -> Source | None:
    if STAGE.fullmatch(place.resolve().name) and is_run(place.resolve().parent):
        raise ConfigError(f"{place} is one stage; --seeds compares whole runs, such as {place.parent}")
    if not place.is_dir() or not is_run(place):
        raise ConfigError(
            f"{place} is not the folder of a run, such as runs/NAME, nor one that corefit compare --seeds has written"
        )
    return replicates.of_run(place, memo, display)


def _output(out: Path | None, places: Sequence[Path]) -> Path:
    """Return the folder to write; by default that of kept results if they are all, or one beside that of the runs."""
    if out is None:
        kept = [place for place in places if _is_kept(place)]
        if kept and len(places) > 1:
            raise ConfigError(f"name the folder to write with --out, such as that of {kept[0]} itself")
        names = [place.resolve().name for place in places]
        alike = itertools.takewhile(lambda letters: len({*letters}) == 1, zip(*names, strict=False))
        name = "".join(letters[0] for letters in alike).rstrip("-_. ") or "-".join(names)
        if len(name) > LONGEST:
            raise ConfigError("so many runs are compared that their names make no folder's; name one with --out")
        out = kept[0] if kept else places[0].resolve().parent.parent / "compare" / name
    refuse_run(out)
    return out


def _joined(sources: Sequence[Source]) -> Source:
    """Return all replicates as those of one source, with what is known of the base and of units."""
    base, units = dict[str, Any](), dict[str, str]()
    for source in reversed(sources):
        base, units = {**base, **source.base}, {**units, **source.units}
    return Source(sources[0].place, replicates.merged(sources), base, units)


def _refuse_over(over: str, found: Source) -> None:
    names = [*dict.fromkeys(each.name for each in found.replicates)]
    if over and over not in names:
        listed = ", ".join(names)
        raise ConfigError(f"--over {over}: no run has a stage {over!r}{near(over, names)}; there are: {listed}")


def _metrics(every: Sequence[Replicate]) -> tuple[list[str], list[str]]:
    """Return the metrics that were measured alike, and a sentence for each that was not, or is not everywhere."""
    kept, said = list[str](), list[str]()
    for name in dict.fromkeys(name for each in every for name in each.evaluated.columns):
        having = [each.evaluated for each in every if name in each.evaluated.columns]
        unlike = next((each for each in having if each.measure(name) != having[0].measure(name)), None)
        if unlike:
            said.append(f"metric {name} is left out: its keys differ between {having[0].place} and {unlike.place}")
            continue
        kept.append(name)
        if len(having) < len(every):
            said.append(f"metric {name} is there in {len(having)} of {len(every)} evaluations; run the others again")
    return kept, said


def _write(folder: Path, found: Source, metrics: Sequence[str], over: str, display: Display) -> None:
    """Write all files, and print the tables."""
    starts = {each.name: each.start for each in found.replicates}
    drifts = _drifts(found.replicates, display)
    measured = [_metric(name, found) for name in metrics] + (drifts.metrics() if drifts else [])
    rows = seeds.seeds_rows(seeds.Compared(starts, measured, over))
    costs = [_costs(name, [each for each in found.replicates if each.name == name]) for name in starts]
    kept = found if drifts else evolve(found, replicates=[_without_drift(each) for each in found.replicates])
    with files.explain_write_errors(folder):
        records.write(folder, kept, metrics)
        report.write_results(folder / "results.json", rows)
        files.write_whole(folder / "results.csv", seeds_table.csv_text(rows).encode())
        files.write_whole(folder / "results.md", seeds_table.markdown(rows, costs).encode())
        forest(rows, folder / "comparison.png")
        _write_drift(folder, drifts, starts)
    report.print_table(costs, rows, display.console)
    seeds_table.print_pairs(rows, display.console)


def _metric(name: str, found: Source) -> seeds.Metric:
    """Return the values of one metric, with the prompts that it was measured on."""
    values: dict[str, dict[int, Sequence[float]]] = {}
    for each in found.replicates:
        if name in each.evaluated.columns:
            values.setdefault(each.name, {})[each.seed] = each.evaluated.columns[name]
    first = next(each.evaluated for each in found.replicates if name in each.evaluated.columns)
    count = len(first.categories)
    rows = next((block.rows for block in first.blocks if name in block.values), range(count))
    prompts = [first.prompts[row] if first.prompts else str(row) for row in rows]
    return seeds.Metric(
        name, values, prompts, [first.categories[row] for row in rows], report.unit_of(name, found.units)
    )


def _drifts(every: Sequence[Replicate], display: Display) -> seeds.Drifts | None:
    """Return what the exposure-bias meter measured, if it was on the same examples and noise levels."""
    having = [each for each in every if each.evaluated.drift]
    if not having:
        return None
    first = having[0].evaluated
    values: dict[str, dict[int, Sequence[Sequence[float]]]] = {}
    for each in having:
        if any(each.evaluated.drift[key] != first.drift[key] for key in ("sigmas", "prompts")):
            display.print(f"drift is left out: {each.evaluated.place} and {first.place} measured other examples")
            return None
        values.setdefault(each.name, {})[each.seed] = each.evaluated.drift["values"]
    return seeds.Drifts(first.drift["sigmas"], first.drift["prompts"], values)


def _without_drift(replicate: Replicate) -> Replicate:
    return evolve(replicate, evaluated=evolve(replicate.evaluated, drift={}))


def _costs(name: str, every: Sequence[Replicate]) -> report.Scores:
    """Return what the training of a stage took, means over its seeds."""

    def mean(key: str) -> float | None:
        known = [each.costs[key] for each in every if key in each.costs]
        return sum(known) / len(known) if known else None

    return report.Scores(
        name,
        {},
        start=every[0].start,
        seconds=mean("seconds") or 0.0,
        samples_per_second=mean("samples_per_second") or 0.0,
        peak_memory=round(mean("peak_memory") or 0),
        survived=mean("survived"),
        steps=mean("steps") or 0.0,
        samples=mean("samples") or 0.0,
    )


def _write_drift(folder: Path, drifts: seeds.Drifts | None, starts: Mapping[str, str]) -> None:
    data, picture = folder / "drift.json", folder / "drift.png"
    if drifts is None:
        for former in (data, picture):
            former.unlink(missing_ok=True)
        return
    curves = drifts.curves(starts)
    files.write_json(data, {"stages": curves})
    drift_curves(curves, picture)
