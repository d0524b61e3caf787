"""report.html: a run, or several ones compared, on one page for someone who did not write it.

The page is made from the files of the run's folder alone, at any moment, and holds everything it shows: pictures,
curves, style and scripts. It asks nothing from the network.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from attrs import evolve

from corefit.run.report.page import charts, facts, pictures
from corefit.run.report.page.folder import RunFolder, StageFiles, is_run, qualified, read_run
from corefit.run.report.page.memo import Memo, stamp
from corefit.run.report.page.tables import tables
from corefit.run.report.page.verdict import DIVERSITY, starts_of, verdict
from corefit.run.report.results import Row
from corefit.system.files import write_whole

__all__ = ["POLICY", "comparison_page", "fingerprint", "is_run", "page", "qualified", "render"]

ASSETS = Path(__file__).with_name("assets")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
"""What a browser lets the page do: nothing that is not in it, but for asking `corefit watch`, which has served it."""
UPLOT = "1.6.32"
MEMO = Memo()


def page(folder: Path) -> None:
    """Write report.html into a run's folder from the files in it; what is missing is left out."""
    write_whole(folder / "report.html", render([("", folder)], folder.resolve().name))


def comparison_page(
    runs: Sequence[tuple[str, Path]], html: Path, rows: Sequence[Row] = (), names: Mapping[Path, str] | None = None
) -> None:
    """Write a page of several runs, given as (label, folder).

    rows   the results of all runs together, in which `qualified(label, stage)` names a stage; by default the results of
           each run for itself
    names  folder of a stage -> its name in `rows`, for the stages that are shown; by default all are
    """
    title = " and ".join(label or folder.name for label, folder in runs)
    write_whole(html, render(runs, title, rows, names=names))


def render(
    runs: Sequence[tuple[str, Path]],
    title: str,
    rows: Sequence[Row] = (),
    live: str = "",
    names: Mapping[Path, str] | None = None,
) -> bytes:
    """Return the page of one run, whose label is "", or of several.

    live   the version of the page, for a browser that asks `corefit watch` whether there is another
    names  see `comparison_page`
    """
    found: list[RunFolder] = []
    for label, folder in runs:
        run = read_run(label, folder, MEMO, sum(len(run.stages) for run in found))
        found.append(run if names is None else _named(run, names))
    more = {"live": live, "live_script": _asset("live.js") if live else ""}
    html = _template().render(_content(found, rows or _rows(found), title) | more)
    MEMO.forget()
    return html.encode()


def fingerprint(folder: Path) -> str:
    """Return what changes whenever a page of the folder would."""
    names = ("*.json", "*.toml", "*/*.json", "*/*.jsonl", "*/samples/*")
    stamps = [stamp(file) for name in names for file in sorted(folder.glob(name))]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]


def _named(run: RunFolder, names: Mapping[Path, str]) -> RunFolder:
    """Return the run with the stages that have names, under these."""
    shown = [evolve(stage, label=names[stage.folder]) for stage in run.stages if stage.folder in names]
    return evolve(run, stages=shown)


def _rows(runs: Sequence[RunFolder]) -> list[Row]:
    """Return the results of all runs; in those of several, names of stages are qualified."""
    found: list[Row] = []
    for run in runs:
        for row in run.rows:
            named: Any = {**row, "stage": qualified(run.label, row["stage"])}
            if start := named.get("start"):
                named["start"] = qualified(run.label, start)
            found.append(named)
    return found


@cache
def _template() -> Any:
    import jinja2

    loader = jinja2.FileSystemLoader(ASSETS)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html")


@cache
def _asset(*names: str) -> Any:
    from markupsafe import Markup

    return Markup("\n".join((ASSETS / name).read_text(encoding="utf-8") for name in names))


def _content(runs: Sequence[RunFolder], rows: Sequence[Row], title: str) -> dict[str, Any]:
    from corefit import __version__

    stages = [stage for run in runs for stage in run.stages]
    starts, colors = starts_of(rows), {stage.label: stage.color for stage in stages}
    curves, drift = charts.curves(runs, MEMO), charts.drift(stages)
    content = {
        **_about(runs, stages),
        **_pictures(stages),
        "tables": tables([row for row in rows if row["metric"] not in DIVERSITY], starts, colors),
        "diversity": tables([row for row in rows if row["metric"] in DIVERSITY], starts, colors),
        "verdict": verdict(rows, starts),
        "over_base": any("base_gain" in row and starts.get(starts.get(row["stage"], "")) for row in rows),
        "curves": curves,
        "curves_note": _curves_note(curves),
        "trained": [stage for stage in stages if stage.metrics],
        "drift": drift,
    }
    return {
        **content,
        "title": title,
        "now": facts.now(),
        "version": __version__,
        "uplot": UPLOT,
        "policy": POLICY,
        "sections": _sections(content),
        "empty": not any(content[key] for key in ("tables", "tiles", "checkpoints", "curves", "provenance", "moving")),
        "style": _asset("uplot.min.css", "page.css"),
        "library": _asset("uplot.min.js"),
        "script": _asset("page.js"),
        "data": _data(content, stages, curves),
    }


def _about(runs: Sequence[RunFolder], stages: Sequence[StageFiles]) -> dict[str, Any]:
    provenance = [
        {"label": run.label, "facts": facts.provenance(run), "pipeline": facts.pipeline_text(run)} for run in runs
    ]
    return {
        "statuses": [found for run in runs if (found := facts.status(run))],
        "alarms": [_alarm(stage) for stage in stages if charts.alarm_steps(stage)],
        "costs": facts.costs(stages),
        "provenance": [each for each in provenance if each["facts"] or each["pipeline"]],
    }


def _alarm(stage: StageFiles) -> str:
    steps = charts.alarm_steps(stage)
    often = f" and {len(steps) - 1} more" if len(steps) > 1 else ""
    return (
        f"The alarm sounded in stage {stage.label} at step {steps[0]}{often}: the reward that it trains on rose while "
        "a held-out one fell. What it gained may be a weakness of the reward."
    )


def _pictures(stages: Sequence[StageFiles]) -> dict[str, Any]:
    """Return the kept samples, the grids of the checkpoints and the animations."""
    kept = {stage.key: media for stage in stages if (media := pictures.kept(stage, MEMO))}
    shown = [stage for stage in stages if stage.key in kept]
    side, most = pictures.size_for([len(media.media) for media in kept.values()])
    urls = {stage.key: pictures.sources(stage, side, most, MEMO) for stage in shown}
    prompts = pictures.prompts_of(shown, MEMO)
    left, right = (shown[0], shown[-1]) if shown else (None, None)
    first = min((media.first for media in kept.values()), default=0)
    rows = [row for row in range(first) if all(row in each for each in urls.values())]
    sheets = {stage.key: found for stage in stages if (found := pictures.sheets(stage, MEMO))}
    scores = pictures.scores_of(shown, sorted(prompts))
    return {
        "shown": shown,
        "left": left,
        "right": right,
        "tiles": [
            {"row": row, "prompt": prompts[row], "left": urls[left.key][row], "right": urls[right.key][row]}
            for row in rows
            if left and right
        ],
        "urls": urls,
        "prompts": prompts,
        "pixels": pictures.is_small(shown, MEMO),
        "extremes": list(scores),
        "extremes_note": _extremes_note(stages, first),
        "scores": scores,
        "checkpoints": [
            {"key": stage.key, "label": stage.label, "sheets": sheets[stage.key]}
            for stage in stages
            if stage.key in sheets
        ],
        "moving": [
            {"label": stage.label, "source": source} for stage in stages if (source := pictures.moving(stage, MEMO))
        ],
    }


def _extremes_note(stages: Sequence[StageFiles], first: int) -> str:
    counts = [len(prompts) for stage in stages if isinstance(prompts := stage.scores.get("prompts"), list)]
    if any((stage.folder / "samples" / "extremes.safetensors").is_file() for stage in stages):
        return f"Of all {max(counts, default=0)} held-out prompts; of equal scores, those of the first prompts."
    return f"Of the first {first} held-out prompts, whose samples were kept."


def _curves_note(curves: Mapping[str, Any] | None) -> str:
    if curves is None:
        return ""
    axis = "time of training" if curves["unit"] == "time" else "number of steps"
    alarms = " A dashed line is where the alarm sounded." if curves["alarms"] else ""
    return f"Over the {axis}, added up along the stages before each.{alarms} Drag to zoom; double-click to see all."


def _sections(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = {
        "results": ("tables", "Results"),
        "comparison": ("tiles", "Comparison"),
        "extremes": ("extremes", "Best and worst"),
        "checkpoints": ("checkpoints", "Checkpoints"),
        "curves": ("curves", "Training"),
        "diversity": ("diversity", "Diversity"),
        "drift": ("drift", "Drift"),
        "costs": ("costs", "Costs"),
        "provenance": ("provenance", "Where this comes from"),
    }
    shown = {**content, "checkpoints": content["checkpoints"] or content["moving"]}
    return [(id, name) for id, (key, name) in names.items() if shown[key]]


def _data(content: Mapping[str, Any], stages: Sequence[StageFiles], curves: Mapping[str, Any] | None) -> Any:
    """Return what the script needs as JSON that is safe inside a page; pictures that it shows are not repeated."""
    from markupsafe import Markup

    drawn = {(side.key, tile["row"]) for side in (content["left"], content["right"]) for tile in content["tiles"]}
    last = content["checkpoints"][-1]["key"] if content["checkpoints"] else ""
    data = {
        "stages": [{"key": stage.key, "label": stage.label, "color": stage.color} for stage in stages],
        "prompts": content["prompts"],
        "pixels": content["pixels"],
        "scores": content["scores"],
        "pictures": {
            key: {row: None if (key, row) in drawn else url for row, url in each.items()}
            for key, each in content["urls"].items()
        },
        "sheets": {
            each["key"]: [
                sheet | ({"source": None} if each["key"] == last and i == len(each["sheets"]) - 1 else {})
                for i, sheet in enumerate(each["sheets"])
            ]
            for each in content["checkpoints"]
        },
        "curves": curves and {key: curves[key] for key in ("unit", "stages", "alarms", "longest")},
        "drift": content["drift"],
    }
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
