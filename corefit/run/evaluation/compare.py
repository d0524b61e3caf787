"""`corefit compare`: the results of several runs, or of some of their stages, in one table, one picture and one page.

Everything is read from the folders of the runs; nothing is generated or scored again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen

from corefit.errors import ConfigError
from corefit.run import report
from corefit.run.evaluation import comparable
from corefit.run.evaluation.comparable import Evaluated
from corefit.run.report.page import is_run, qualified
from corefit.run.report.page.folder import BASE, STAGE, RunFolder, StageFiles, read_run
from corefit.run.report.page.memo import Memo
from corefit.system import files
from corefit.system.display import Display

COSTS = ("seconds", "samples_per_second", "peak_memory", "survived")
LONGEST = 150
"""Letters of the longest name that a comparison gets by itself."""


@frozen(eq=False)
class Compared:
    """What is compared of one run: the base first, then stages of which each comes after the one that it starts from.

    Its label is what tells the run from the others; "" where it is the only one.
    """

    files: RunFolder
    stages: Sequence[Evaluated]
    base: str = field(default="")
    """The name of the base in the results; by default its own, qualified by the label."""

    def name(self, stage: str) -> str:
        """Return the name of a stage in the results; "" for what is before the base."""
        own = qualified(self.files.label, stage) if stage else ""
        return self.base or own if stage == self.stages[0].files.name else own


def compare(places: Sequence[Path], out: Path | None, display: Display) -> Path:
    """Compare the runs and stages in the folders `places`; return the folder with what was written.

    Raises ConfigError where they cannot be compared, and DataError where a file is damaged.
    """
    chosen = _chosen(places)
    labels, memo = _labels([*chosen]), Memo()
    read = [read_run(label, folder, memo) for label, folder in zip(labels, chosen, strict=True)]
    runs = [Compared(run, list(_evaluated(run, chosen[run.folder], display))) for run in read]
    first, *others = chain.from_iterable(run.stages for run in runs)
    comparable.refuse_unlike(first, others)
    folder = _output(out, runs, chosen)
    for line in comparable.differences(first, others):
        display.print(line)
    metrics = comparable.metrics([first, *others])
    for line in metrics.left_out:
        display.print(line)
    runs = _with_base(runs, metrics.names, display)
    _write(folder, runs, metrics.names, display)
    return folder


def _chosen(places: Sequence[Path]) -> dict[Path, list[str]]:
    """Return the folder of each run, with those of its stages that were named; none where the run as a whole was."""
    if len({place.resolve() for place in places}) < 2:
        raise ConfigError(
            f"{places[0]} alone is compared with nothing; name another run, or two of its stages, such as RUN/01-soar "
            "RUN/02-grpo (a run's own results are in its report.html)"
        )
    found: dict[Path, list[str]] = {}
    for place in places:
        folder = place.resolve()
        stage = folder.name if STAGE.fullmatch(folder.name) and is_run(folder.parent) else ""
        run = folder.parent if stage else folder
        if not folder.is_dir() or not is_run(run):
            raise ConfigError(
                f"{place} is not the folder of a run, such as runs/NAME, or of a stage, runs/NAME/01-soar"
            )
        found.setdefault(run, []).append(stage)
    return {run: [] if "" in stages else stages for run, stages in found.items()}


def _labels(folders: Sequence[Path]) -> list[str]:
    """Return the shortest end of each path that no other one has; "" for a path that is alone."""
    if len(folders) == 1:
        return [""]
    return [
        next(
            "/".join(folder.parts[-n:])
            for n in range(1, len(folder.parts) + 1)
            if not any(other.parts[-n:] == folder.parts[-n:] for other in folders if other != folder)
        )
        for folder in folders
    ]


def _evaluated(run: RunFolder, named: Sequence[str], display: Display) -> Iterator[Evaluated]:
    """Yield the base and the stages that have scores: all, or those that were named and what they come from."""
    wanted = {stage.name for stage in run.stages} if not named else _lineage(run.stages, named)
    there: set[str] = set()
    for stage in run.stages:
        if stage.name not in wanted:
            continue
        evaluated = comparable.read(stage)
        if evaluated and (stage.start in there or stage.name == BASE):
            there.add(stage.name)
            yield evaluated
        elif stage.name == BASE or stage.folder.name in named:
            raise ConfigError(f"{comparable.shown(stage.folder)} has no scores; compare it after a run with [eval]")
        else:
            display.print(f"{qualified(run.label, stage.name)} has no scores yet, and is left out")
    if not there:
        raise ConfigError(f"{comparable.shown(run.folder)} has no scores; compare it after a run with [eval]")


def _lineage(stages: Sequence[StageFiles], named: Sequence[str]) -> set[str]:
    """Return the names of the stages in the folders `named`, and of all that they come from."""
    starts = {stage.name: stage.start for stage in stages}
    left, found = [stage.name for stage in stages if stage.folder.name in named], set[str]()
    while left:
        found.add(name := left.pop())
        left += [starts[name]] if starts[name] else []
    return found


def _output(out: Path | None, runs: Sequence[Compared], chosen: Mapping[Path, Sequence[str]]) -> Path:
    """Return the folder to write: `out`, or one beside that of the runs. Raises ConfigError if it is a run's."""
    if out is None:
        names = ["-".join([run.files.label or run.files.folder.name, *chosen[run.files.folder]]) for run in runs]
        name = "-".join(names).replace("/", "-")
        if len(name) > LONGEST:
            raise ConfigError("so many runs are compared that their names make no folder's; name one with --out")
        out = runs[0].files.folder.parent.parent / "compare" / name
    refuse_run(out)
    return out


def refuse_run(out: Path) -> None:
    """Raise ConfigError if a folder to be written is that of a run, or of a stage."""
    run = out.parent if STAGE.fullmatch(out.resolve().name) else out
    if any((run / name).exists() for name in ("pipeline.toml", "evaluation.toml", "run.json", "00-base")):
        raise ConfigError(f"{out} is the folder of a run, which a comparison would overwrite; name another with --out")


def _with_base(runs: Sequence[Compared], metrics: Sequence[str], display: Display) -> Sequence[Compared]:
    """Return the runs with one base for all, if it is the same; else each with its own."""
    bases = [run.stages[0] for run in runs]
    if difference := next(filter(None, (comparable.base_difference(bases[0], b, metrics) for b in bases[1:])), ""):
        display.print(f"{difference}; each run's gains are over its own base")
        return runs
    return [evolve(run, base=bases[0].files.name) for run in runs]


def _write(folder: Path, runs: Sequence[Compared], metrics: Sequence[str], display: Display) -> None:
    """Write all files, and print the table."""
    units = {row["metric"]: row["unit"] for run in runs for row in run.files.rows if "unit" in row}
    stages: dict[str, tuple[report.Scores, Evaluated]] = {}
    rows: list[report.Row] = []
    for run in runs:  # each for itself, so that its numbers are those of its own results.json
        scores = [_scores(run, stage, metrics, units) for stage in run.stages]
        rows += [row for row in report.results(scores) if row["stage"] not in stages]
        for each, stage in zip(scores, run.stages, strict=True):
            stages.setdefault(each.stage, (each, stage))
    for row in rows:
        if row["metric"] not in units and "unit" in row:  # version 0.1 knew no units
            del row["unit"]
    with files.explain_write_errors(folder):
        report.write_results(folder / "results.json", rows)
        files.write_whole(folder / "results.csv", report.csv_text(rows).encode())
        files.write_whole(folder / "results.md", report.markdown(rows).encode())
        comparable.draw({name: stage for name, (_, stage) in stages.items()}, folder / "comparison.png", display)
        names = {stage.files.folder: name for name, (_, stage) in stages.items()}
        places = [(run.files.label, run.files.folder) for run in runs]
        report.comparison_page(places, folder / "report.html", rows, names)
    report.print_table([scores for scores, _ in stages.values()], rows, display.console)


def _scores(run: Compared, stage: Evaluated, metrics: Sequence[str], units: Mapping[str, str]) -> report.Scores:
    costs: dict[str, Any] = {key: stage.files.about[key] for key in COSTS if stage.files.about.get(key) is not None}
    return report.Scores(
        run.name(stage.files.name),
        {name: stage.values[name] for name in metrics if name in stage.values},
        stage.categories,
        prompts=stage.prompts,
        units=units,
        blocks=[evolve(b, values={name: b.values[name] for name in metrics if name in b.values}) for b in stage.blocks],
        start=run.name(stage.files.start),
        **costs,
    )
