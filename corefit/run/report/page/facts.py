"""What a page says of a run besides its results: its state, its costs, and where it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast

from corefit.run.report.page.folder import RunFolder, StageFiles
from corefit.run.report.table import MISSING, duration
from corefit.system import memory
from corefit.system.public import without_places, without_secrets

HIDDEN = "(not shown)"


def status(run: RunFolder) -> dict[str, Any] | None:
    """Return the state of a run in words; None where its folder does not tell, or it is finished and nothing to say."""
    state = str(run.about.get("status", ""))
    if not state:
        return None
    stages = _stages(run)
    current = next((e for e in stages if e.get("state") in ("training", "evaluating")), None)
    started, changed = _time(run.about.get("started")), _time(run.about.get("changed"))
    text = {
        "running": f"Running{_doing(current)}; started {started}",
        "finished": f"Finished {changed}; started {started}",
        "failed": f"Failed {changed}{_doing(current)}; started {started}",
        "stopped": f"Stopped {changed}{_doing(current)}; started {started}; the same command goes on",
    }.get(state, state)
    label = f"{run.label}: " if run.label else ""
    return {
        "state": state,
        "text": label + text,
        "changed": str(run.about.get("changed", "")) if state == "running" else "",
        "done": _share(stages) if state == "running" else None,
        "error": readable(str(run.about.get("error") or "")),
    }


def _stages(run: RunFolder) -> list[Mapping[str, Any]]:
    found = run.about.get("stages")
    entries = cast(list[Any], found) if isinstance(found, list) else []
    return [cast(Mapping[str, Any], entry) for entry in entries if isinstance(entry, dict)]


def _doing(current: Mapping[str, Any] | None) -> str:
    if current is None:
        return ""
    steps = f", step {current.get('step', 0)} of {current['steps']}" if current.get("steps") else ""
    what = "evaluating" if current.get("state") == "evaluating" else "training"
    return f": {what} {current.get('name', '')}{steps if what == 'training' else ''}"


def _share(stages: Sequence[Mapping[str, Any]]) -> float | None:
    """Return which share of all steps is done."""
    total = sum(int(e.get("steps") or 0) for e in stages)
    done = sum(int(e.get("steps") or 0) if e.get("state") == "done" else int(e.get("step") or 0) for e in stages)
    return round(min(1.0, done / total), 4) if total else None


def costs(stages: Sequence[StageFiles]) -> dict[str, Any] | None:
    """Return the table of what each stage has cost; None if nothing is known."""
    trained = [stage for stage in stages if stage.about.get("seconds") or stage.metrics]
    if not trained:
        return None
    columns = {
        "steps": [_steps(stage) for stage in trained],
        "time": [duration(_number(stage, "seconds")) for stage in trained],
        "samples / s": [_speed(_number(stage, "samples_per_second")) for stage in trained],
        "peak memory": [memory.size(int(_number(stage, "peak_memory"))) for stage in trained],
        "energy": [_energy(_number(stage, "energy_joules")) for stage in trained],
        "update kept in bf16": [_percent(_number(stage, "survived")) for stage in trained],
    }
    known = {head: cells for head, cells in columns.items() if {*cells} != {MISSING}}
    lines = [[stage.label, *cells] for stage, *cells in zip(trained, *known.values(), strict=True)]
    return {"heads": ["stage", *known], "lines": lines}


def _steps(stage: StageFiles) -> str:
    step = stage.about.get("step") or (stage.metrics[-1]["step"] if stage.metrics else 0)
    steps = stage.about.get("steps") or step
    return str(steps) if step == steps else f"{step} of {steps}"


def _number(stage: StageFiles, key: str) -> float:
    """Return what run.json or done.json says, or the last line of metrics.jsonl; 0 where nothing does."""
    value = stage.about.get(key) or (stage.metrics[-1].get(key) if stage.metrics else 0)
    return float(value) if isinstance(value, int | float) else 0.0


def _speed(samples: float) -> str:
    return f"{samples:.1f}" if samples else MISSING


def _energy(joules: float) -> str:
    hours = joules / 3600
    return MISSING if not joules else f"{hours:.1f} Wh" if hours < 1000 else f"{hours / 1000:.2f} kWh"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share else MISSING


def provenance(run: RunFolder) -> list[tuple[str, str]]:
    """Return names and texts of where a run comes from: of run.json, and of pipeline.toml what that has not."""
    about = run.about
    found = [
        ("started", _time(about.get("started"))),
        ("continued", _time(about.get("continued"))),
        ("last changed", _time(about.get("changed"))),
        ("commit of the project", _text(about.get("commit"))),
        ("versions", _text(about.get("versions"))),
        ("devices", _text(about.get("devices"))),
        ("processes", _text(about.get("processes"))),
        ("precision", _text(about.get("precision") or run.pipeline.get("precision"))),
        ("base model", _model(about.get("base")) or _text(_within(run.pipeline, "backbone", "path"))),
        ("seed", _text(_either(about, run.pipeline, "seed"))),
        ("data", _data(about.get("data")) or _text(_within(run.pipeline, "data", "source", "use"))),
        ("stages", "; ".join(_described(run))),
    ]
    return [(name, readable(text)) for name, text in found if text]


def _model(base: Any) -> str:
    """Return the name of a model and the beginning of its weights' hash."""
    if not isinstance(base, dict):
        return _text(base)
    found = cast(Mapping[str, Any], base)
    return ", ".join(text for text in (_text(found.get("name")), _text(found.get("hash"))[:12]) if text)


def _data(counts: Any) -> str:
    """Return the counts of the data in words: "8192 examples; 600 held-out prompts, 3 of them in the training data"."""
    if not isinstance(counts, dict):
        return _text(counts)
    found = cast(Mapping[str, Any], counts)
    twice = f", {found['duplicates']} of them in the training data" if found.get("duplicates") is not None else ""
    texts = {"examples": "{} examples", "prompts": f"{{}} held-out prompts{twice}", "left_out": "{} left out"}
    return "; ".join(text.format(found[key]) for key, text in texts.items() if found.get(key) is not None)


def _either(first: Mapping[str, Any], second: Mapping[str, Any], key: str) -> Any:
    return first[key] if first.get(key) is not None else second.get(key)


def _within(tables: Mapping[str, Any], *keys: str) -> Any:
    found: Any = tables
    for key in keys:
        found = cast(Mapping[str, Any], found).get(key) if isinstance(found, dict) else None
    return found


def _described(run: RunFolder) -> Iterator[str]:
    """Yield what each stage of pipeline.toml does: "soar: soar, 300 steps of 64"."""
    stages = run.pipeline.get("stage")
    for entry in cast(list[Any], stages) if isinstance(stages, list) else []:
        objective, steps, batch = _within(entry, "objective", "use"), _within(entry, "steps"), _within(entry, "batch")
        yield f"{_within(entry, 'name')}: {f'{objective}, ' if objective else ''}{steps} steps of {batch}"


def _text(value: Any) -> str:
    """Return a value of run.json as a line: "torch 2.9.1, corefit 0.1.0"."""
    if value is None or value == "":
        return ""
    if isinstance(value, dict):
        table = cast(Mapping[str, Any], value)
        named = {key.replace("_", " "): _text(inner) for key, inner in table.items()}
        return ", ".join(f"{key} {text}" for key, text in named.items() if text)
    if isinstance(value, list):
        return ", ".join(map(_text, cast(list[Any], value)))
    return str(value)


def _time(value: Any) -> str:
    """Return an ISO time as a page shows it."""
    try:
        return datetime.fromisoformat(str(value)).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return ""


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def pipeline_text(run: RunFolder) -> str:
    """Return pipeline.toml without secrets and absolute paths; nothing where there is none."""
    import tomli_w

    return tomli_w.dumps(without_places(without_secrets(run.pipeline, HIDDEN))) if run.pipeline else ""


def readable(text: str) -> str:
    """Return a text without absolute paths, and without users and passwords in addresses."""
    return str(without_places(without_secrets(text)))
