"""Reads a run's folder for its page: whatever is there, of a running, finished or killed run, of any version."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from attrs import field, frozen

from corefit.errors import CorefitError
from corefit.run.report.metrics import read_metrics
from corefit.run.report.page.memo import Memo, stamp
from corefit.run.report.results import Row, Scores, blocks_of, read_results, results

STAGE = re.compile(r"\d\d+-(.+)")
BASE = "base"
COSTS = ("seconds", "samples_per_second", "peak_memory")


@frozen(eq=False)
class StageFiles:
    """The files of one stage, or of the base, and what is known of it."""

    key: str
    """What tells this stage from all others on the page."""
    name: str
    label: str
    """Its name on the page; the name of the run is before it where several runs are compared."""
    start: str
    """The name of the stage that it starts from; "" for the base."""
    folder: Path
    color: int
    about: Mapping[str, Any]
    """Its entry in run.json, with the costs of done.json where that has none."""
    scores: Mapping[str, Any]
    """scores.json, or nothing."""
    drift: Mapping[str, Any]
    """drift.json, or nothing."""
    metrics: Sequence[Mapping[str, Any]]
    """The lines of metrics.jsonl."""

    @property
    def log(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def sheets(self) -> list[Path]:
        """The sample grids, in the order of their steps."""
        return sorted(self.folder.glob("samples/step-*.png"), key=lambda path: (len(path.name), path.name))


@frozen(eq=False)
class RunFolder:
    """What is in a run's folder."""

    label: str
    """What the page calls it; "" where it is the only one."""
    folder: Path
    about: Mapping[str, Any]
    """run.json, or nothing."""
    pipeline: Mapping[str, Any]
    """pipeline.toml, or nothing."""
    stages: Sequence[StageFiles] = field(factory=tuple[StageFiles, ...])
    rows: Sequence[Row] = ()


def read_run(label: str, folder: Path, memo: Memo, first_color: int = 0) -> RunFolder:
    """Read what is in the folder; a missing or damaged file is as if it held nothing."""
    about, pipeline = _json(folder / "run.json", memo), _toml(folder / "pipeline.toml", memo)
    stages: list[StageFiles] = []
    for place in _stage_folders(folder, pipeline):
        name = place.name.partition("-")[2]
        entry = next((e for e in _entries(about, "stages") if name in (e.get("name"), e.get("folder"))), {})
        before = stages[-1].name if stages else ""
        stages.append(
            StageFiles(
                key=f"{label}/{place.name}",
                name=name,
                label=qualified(label, name),
                start="" if not stages else str(entry.get("start") or _from(pipeline, name) or before),
                folder=place,
                color=_color(first_color + len(stages), base=not stages and not first_color),
                about=_with_costs(entry, place, memo),
                scores=_json(place / "scores.json", memo),
                drift=_json(place / "drift.json", memo),
                metrics=memo.of("metrics", [place / "metrics.jsonl"], lambda place=place: _metrics(place)),
            )
        )
    data = about.get("data")
    unscored = "eval" not in pipeline and isinstance(data, Mapping) and "examples" in data and "prompts" not in data
    rows = () if unscored else _rows(folder, stages, memo)  # scores that are left are of a former pipeline
    return RunFolder(label, folder, about, pipeline, stages, rows)


def qualified(label: str, stage: str) -> str:
    """Return the name of a run's stage on a page of several runs."""
    return f"{label}: {stage}" if label else stage


def is_run(folder: Path) -> bool:
    """Return whether the folder holds anything of a run."""
    names = ("run.json", "pipeline.toml", "results.json", "report.html")
    return any((folder / name).is_file() for name in names) or bool(_stage_folders(folder))


def _color(number: int, base: bool) -> int:
    """Return one of the eight colors of page.css; the first, gray, is for the base alone."""
    return 0 if base else 1 + (number - 1) % 7


def _stage_folders(folder: Path, pipeline: Mapping[str, Any] | None = None) -> list[Path]:
    """Return the folders of the base and of the stages, without those that the pipeline has no longer."""
    if not folder.is_dir():
        return []
    found = sorted(path for path in folder.iterdir() if path.is_dir() and STAGE.fullmatch(path.name))
    names = [BASE, *(str(entry.get("name")) for entry in _entries(pipeline or {}, "stage"))]
    current = [f"{number:02}-{name}" for number, name in enumerate(names)]
    return [path for path in found if path.name in current] if len(names) > 1 else found


def _with_costs(entry: Mapping[str, Any], place: Path, memo: Memo) -> Mapping[str, Any]:
    cost = _json(place / "done.json", memo).get("cost")
    return {**(cast(dict[str, Any], cost) if isinstance(cost, dict) else {}), **entry}


def _from(pipeline: Mapping[str, Any], name: str) -> str:
    return next((str(e["from"]) for e in _entries(pipeline, "stage") if e.get("name") == name and e.get("from")), "")


def _entries(tables: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = tables.get(key)
    entries = cast(list[Any], found) if isinstance(found, list) else []
    return [cast(Mapping[str, Any], entry) for entry in entries if isinstance(entry, dict)]


def _json(file: Path, memo: Memo) -> Mapping[str, Any]:
    return memo.of("json", [file], lambda: _parsed(file, json.loads))


def _toml(file: Path, memo: Memo) -> Mapping[str, Any]:
    return memo.of("toml", [file], lambda: _parsed(file, tomllib.loads))


def _parsed(file: Path, parse: Any) -> Mapping[str, Any]:
    try:
        content = parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast(Mapping[str, Any], content) if isinstance(content, dict) else {}


def _metrics(place: Path) -> list[dict[str, Any]]:
    try:
        return read_metrics(place / "metrics.jsonl")
    except (OSError, CorefitError):
        return []


def _rows(folder: Path, stages: Sequence[StageFiles], memo: Memo) -> Sequence[Row]:
    """Return results.json; while a run goes on, what its scores give so far."""
    file = folder / "results.json"
    files = [file, *(stage.folder / "scores.json" for stage in stages)]
    return memo.of("rows", files, lambda: _newest_rows(file, stages))


def _newest_rows(file: Path, stages: Sequence[StageFiles]) -> Sequence[Row]:
    written = _written_rows(file)
    scored = [stage for stage in stages if stage.scores.get("values")]
    newest = max((stamp(stage.folder / "scores.json").changed for stage in scored), default=0)
    all_there = {row["stage"] for row in written} >= {stage.name for stage in scored}
    if written and all_there and stamp(file).changed >= newest:
        return written
    units = {row["metric"]: row["unit"] for row in written if "unit" in row}
    try:
        rows = results([_scores(stage, stage.scores.get("units", units)) for stage in scored])
    except (CorefitError, AssertionError, AttributeError, LookupError, TypeError, ValueError):
        return written  # scores of another version, or of different prompts: the run itself says what is wrong
    known = bool(units) or all("units" in stage.scores for stage in scored)
    return rows if known else [_without_units(row) for row in rows]


def _written_rows(file: Path) -> Sequence[Row]:
    try:
        found = read_results(file) if file.is_file() else []
    except (OSError, CorefitError):
        return []
    return found if all(map(_is_sound, found)) else []


def _is_sound(row: Mapping[str, Any]) -> bool:
    """Return whether a row of results.json has texts where texts belong, and numbers everywhere else."""
    texts = {"stage", "metric", "category", "start", "unit"} & row.keys()
    return all(isinstance(row[key], str) for key in texts) and all(
        type(row[key]) in (int, float) and math.isfinite(row[key]) for key in row.keys() - texts
    )


def _scores(stage: StageFiles, units: Mapping[str, str]) -> Scores:
    found = stage.scores
    return Scores(
        stage.name,
        found["values"],
        found.get("categories", ()),
        prompts=found.get("prompts", ()),
        units=units,
        blocks=blocks_of(found),
        start=stage.start,
    )


def _without_units(row: Row) -> Row:
    """Return a row as version 0.1 wrote it: whether it is a share is then read from its values."""
    row.pop("unit", None)
    return row
