"""What determines weights and scores: finished ones are recognised by its hash, and a difference can be said."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen, has

import corefit
from corefit.config import Reader
from corefit.pipeline import CHOICES, Pipeline
from corefit.stage import Stage

QUIET = ("log_every", "checkpoint_every", "keep", "sample_every")
"""Keys of a stage that change what is shown and kept, not what is learned."""
CHANGED: Mapping[str, str] = {
    "weights": "backbone weights changed",
    "dataset": "its data changed",
    "model": "its weights changed",
    "prompts": "the prompts changed",
}
"""What to say of a part that is a hash itself."""
SAID = 3
"""Differences that are named; the rest is counted."""


@frozen
class Identity:
    """Everything that determines a result, as nested JSON."""

    parts: Mapping[str, Any]

    @staticmethod
    def of(parts: Mapping[str, Any]) -> Identity:
        return Identity(json.loads(json.dumps(parts, default=str)))

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()

    def since(self, former: Mapping[str, Any]) -> str:
        """How it differs from former parts, in a few words."""
        found = differences(former, self.parts)
        more = [f"and {len(found) - SAID} more"] if len(found) > SAID else []
        return ", ".join([*found[:SAID], *more])


def of_base(pipeline: Pipeline) -> Identity:
    """Of the weights that the first stage starts from."""
    tables = {k: v for k, v in _tables(pipeline, pipeline.backbone).items() if k != "path"}
    return Identity.of(
        {
            "weights": pipeline.backbone.weights_key(),
            "backbone": tables,
            "code": _code(pipeline, pipeline.backbone),
        }
    )


def of_stage(pipeline: Pipeline, stage: Stage, before: Identity, dataset: str, precision: str) -> Identity:
    """Of a stage's weights.

    before     of what it starts from
    dataset    key of its encoded data
    precision  "fp32" or "bf16"
    """
    tables = _tables(pipeline, stage)
    return Identity.of(
        {
            "before": _origin(before),
            "corefit": corefit.__version__,
            "dataset": dataset,
            "data": {"order": pipeline.data.order},
            "precision": precision,
            "seed": pipeline.seed,
            "stage": {key: value for key, value in tables.items() if key not in (*QUIET, "train")},
            "train": _tables(pipeline, pipeline.mode(stage)),
            "code": _code(pipeline, stage),
        }
    )


def of_scores(pipeline: Pipeline, weights: Identity, prompts: str) -> Identity:
    """Of the held-out scores of weights; `prompts` is the key of the encoded prompts."""
    eval = _tables(pipeline, pipeline.eval)
    return Identity.of(
        {
            "model": weights.hash,
            "prompts": prompts,
            "corefit": corefit.__version__,
            "seed": pipeline.seed,
            "eval": {key: value for key, value in eval.items() if key not in ("prompts", "samples")},
            "code": _code(pipeline, pipeline.eval),
        }
    )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What is different, a few words each; a stage that starts from something else says that alone."""
    if old == new:
        return []
    if not old:
        return ["what determined the former one is not known"]
    was, now = old.get("before", {}), new.get("before", {})
    if origin := _origin_changes(was, now):
        return [origin]
    found = [text for name in new if name != "before" for text in _part_changes(name, old.get(name), new[name])]
    return list(dict.fromkeys([*differences(was, now), *found])) or [_moved(old.get("code", {}), new.get("code", {}))]


# parts


def _origin(before: Identity) -> Mapping[str, Any]:
    """A stage's name and hash; of the base all of it, so that a difference can be said."""
    stage = before.parts.get("stage")
    return {"stage": stage["name"], "identity": before.hash} if stage else before.parts


def _tables(pipeline: Pipeline, value: Any) -> dict[str, Any]:
    return Reader(pipeline.host, pipeline.folder, CHOICES).tables(value)


def _code(pipeline: Pipeline, value: Any) -> dict[str, str]:
    """Package or file -> hash of its source, for the class of `value` and of all inside it that is not corefit's."""
    found: dict[str, str] = {}
    if isinstance(value, (list, tuple)):
        for item in value:  # pyright: ignore[reportUnknownVariableType]
            found |= _code(pipeline, item)
    elif has(type(value)):
        top = type(value).__module__.partition(".")[0]
        if top != "corefit":
            file = Path(getattr(sys.modules[top], "__file__", None) or top)
            found[_named(pipeline, top, file)] = _source(file)
        for name in getattr(type(value), "__attrs_attrs__", ()):
            if name.init:
                found |= _code(pipeline, getattr(value, name.name))
    return found


def _named(pipeline: Pipeline, module: str, file: Path) -> str:
    """The package, or a local plugin file as seen from the pipeline: a project may move as a whole."""
    local = file.resolve() in pipeline.host.files
    return os.path.relpath(file.resolve(), pipeline.folder) if local else module


def _source(file: Path) -> str:
    """Hash of all Python files of a package, or of the one file of a module."""
    files = sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files if f.is_file())).hexdigest()


# differences


def _origin_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Of the stage that a later one starts from; the base says more, as parts."""
    if old == new or "stage" not in new:
        return ""
    if old.get("stage") != new["stage"]:
        return f"it starts from stage {new['stage']}, not {old.get('stage', 'the base')}"
    return f"stage {new['stage']}, which it starts from, changed"


def _part_changes(name: str, old: Any, new: Any) -> Iterator[str]:
    if name in CHANGED:
        yield from [CHANGED[name]] if old != new else []
    elif name == "code":
        # one that came or went did so with a key that says it
        both = sorted((old or {}).keys() & (new or {}).keys())
        yield from (f"code of {module} changed" for module in both if old[module] != new[module])
    else:
        yield from _changes("" if name == "stage" else name, old, new)


def _moved(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Where all keys are the same: a plugin of the same name comes from another package or file."""
    came, gone = (", ".join(sorted(one.keys() - other.keys())) for one, other in ((new, old), (old, new)))
    return f"code of {came}, formerly of {gone}" if came and gone else "what determines it changed"


def _changes(path: str, old: Any, new: Any) -> Iterator[str]:
    """'optimizer.lr 0.001 -> 0.0005' for every key under `path`."""
    if old == new:
        return
    if _used(old) and _used(old) == _used(new):
        old, new = _by_use(old), _by_use(new)
    if isinstance(old, Mapping) and isinstance(new, Mapping) and _used(old) == _used(new):
        for key in (*new, *(key for key in old if key not in new)):
            yield from _changes(f"{path}.{key}".strip("."), old.get(key), new.get(key))
    else:
        yield f"{path} {_shown(old)} -> {_shown(new)}"


def _by_use(value: Any) -> Any:
    """A list of tables as a table of them, as their keys are written for --set."""
    return {item["use"]: item for item in value} if isinstance(value, Sequence) else value


def _used(value: Any) -> Sequence[str]:
    """What a table, or each of a list of tables, says to `use`; nothing for anything else."""
    if isinstance(value, Mapping):
        return [value["use"]] if "use" in value else []
    items = value if isinstance(value, list) else []
    return [item["use"] for item in items if isinstance(item, Mapping) and "use" in item]


def _shown(value: Any) -> str:
    """As a person reads it: a table by what it uses, long text cut."""
    if used := _used(value):
        return ", ".join(used)
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
