"""What determines weights and scores: finished ones are recognised by its hash, and a difference can be said."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, fields, frozen, has

import corefit
from corefit.pipeline.pipeline import CHOICES, Pipeline
from corefit.pipeline.reader import Reader
from corefit.system.files import json_digest, source
from corefit.types import ROUNDING, Weighted
from corefit.types.stage import Stage

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
    rounding: Mapping[str, Any] = field(factory=dict[str, Any], eq=False)
    """Key -> value of what changes rounding alone, which determines nothing."""
    former: Mapping[str, Any] = field(factory=dict[str, Any], eq=False)
    """The parts as version 0.1 had them, which counted rounding among them; for what it has left."""

    @staticmethod
    def of(parts: Mapping[str, Any], rounding: Mapping[str, Any], former: Mapping[str, Any]) -> Identity:
        """`former` are those of the parts that version 0.1 had otherwise."""
        return Identity(*json.loads(json.dumps([parts, rounding, {**parts, **former}], default=str)))

    @property
    def hash(self) -> str:
        return json_digest(self.parts)

    def fits(self, kept: Mapping[str, Any]) -> bool:
        """Whether done.json or scores.json is of this: what differs changes rounding alone."""
        return kept["identity"] == (self.hash if "rounding" in kept else json_digest(self.former))

    def rounded(self, former: Mapping[str, Any] | None) -> str:
        """What changes rounding alone and is not as in the `former` rounding, if that is known; "" if nothing is."""
        if former is None:
            return ""
        keys = [*self.rounding, *(key for key in former if key not in self.rounding)]
        return ", ".join(text for key in keys for text in _changes(key, former.get(key), self.rounding.get(key)))

    def since(self, former: Mapping[str, Any]) -> str:
        """How it differs from former parts, in a few words."""
        found = differences(former, self.parts)
        more = [f"and {len(found) - SAID} more"] if len(found) > SAID else []
        return ", ".join([*found[:SAID], *more])


def of_base(pipeline: Pipeline) -> Identity:
    """Of the weights that the first stage starts from."""
    tables, rounding, former = _tables(pipeline, pipeline.backbone, "backbone", ("path",))
    return Identity.of(
        {
            "weights": pipeline.backbone.weights_key(),
            "backbone": tables,
            "code": _code(pipeline, pipeline.backbone),
        },
        rounding,
        {"backbone": former},
    )


def of_stage(pipeline: Pipeline, stage: Stage, before: Identity, dataset: str, precision: str) -> Identity:
    """Of a stage's weights.

    before     of what it starts from
    dataset    key of its encoded data
    precision  "fp32" or "bf16"
    """
    tables, rounding, former = _tables(pipeline, stage, without=(*QUIET, "train"))
    if former["save_dtype"] == "fp32":
        del former["save_dtype"]  # version 0.1 had no such key
    return Identity.of(
        {
            "before": _origin(before, before.parts),
            "corefit": corefit.__version__,
            "dataset": dataset,
            "data": {"order": pipeline.data.order},
            "precision": precision,
            "seed": pipeline.seed,
            "stage": tables,
            "train": _tables(pipeline, pipeline.mode(stage))[0],
            "code": _code(pipeline, stage),
        },
        {**rounding, **_tables(pipeline, pipeline.backbone, "backbone")[1]},
        {"before": _origin(before, before.former), "stage": former},
    )


def of_scores(pipeline: Pipeline, weights: Identity, prompts: str, held: str) -> Identity:
    """Return what determines the held-out scores of weights.

    prompts  key of the encoded prompts
    held     dtype of the weights that do not train, "" where nothing is computed in bfloat16
    """
    tables, rounding, former = _tables(pipeline, pipeline.eval, "eval", ("prompts", "samples"))
    return Identity.of(
        {
            "model": weights.hash,
            "prompts": prompts,
            "corefit": corefit.__version__,
            "seed": pipeline.seed,
            **({"weights held in": held} if held else {}),
            "eval": tables,
            "code": _code(pipeline, pipeline.eval),
        },
        rounding,
        {"model": json_digest(weights.former), "eval": former},
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


def _origin(before: Identity, parts: Mapping[str, Any]) -> Mapping[str, Any]:
    """A stage's name and hash; of the base all of its `parts`, so that a difference can be said."""
    stage = before.parts.get("stage")
    return {"stage": stage["name"], "identity": json_digest(parts)} if stage else parts


def _tables(
    pipeline: Pipeline, value: Any, path: str = "", without: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The tables of a value that lies at `path`: of what determines results, keys that change rounding alone, and all.

    without  keys of the value that are in neither
    """
    tables = Reader(pipeline.host, pipeline.folder, CHOICES).tables(value)
    former = {key: copy.deepcopy(inner) for key, inner in tables.items() if key not in without}
    rounding = dict(_rounding(value, tables, path))
    return {key: inner for key, inner in tables.items() if key not in without}, rounding, former


def _rounding(value: Any, table: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Take the keys that change rounding alone out of a table, and of those in it: 'objective.chunk' and its value."""
    if isinstance(value, (list, tuple)):
        for number, (item, inner) in enumerate(zip(value, table, strict=True)):  # pyright: ignore[reportUnknownVariableType,reportUnknownArgumentType]
            label = inner.get("use", number) if isinstance(inner, dict) else number  # pyright: ignore[reportUnknownVariableType,reportUnknownMemberType]
            yield from _rounding(item, inner, f"{path}.{label}")
        return
    if isinstance(value, Weighted):  # whose keys lie beside those of the plugin
        value = value.value
    for each in fields(type(value)) if has(type(value)) else ():
        if each.init and each.metadata.items() >= ROUNDING.items():
            yield f"{path}.{each.name}".strip("."), table.pop(each.name, None)
        elif each.init and each.name in table:
            yield from _rounding(getattr(value, each.name), table[each.name], f"{path}.{each.name}")


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
            found[_named(pipeline, top, file)] = source(file)
        for name in getattr(type(value), "__attrs_attrs__", ()):
            if name.init:
                found |= _code(pipeline, getattr(value, name.name))
    return found


def _named(pipeline: Pipeline, module: str, file: Path) -> str:
    """The package, or a local plugin file as seen from the pipeline: a project may move as a whole."""
    local = file.resolve() in pipeline.host.files
    return os.path.relpath(file.resolve(), pipeline.folder) if local else module


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
