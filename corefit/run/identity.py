"""What determines weights and scores: its hash tells whether finished ones are reused, its parts what has changed."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from attrs import field, fields, frozen, has

import corefit
from corefit.pipeline.eval import Eval
from corefit.pipeline.evaluation import Evaluation
from corefit.pipeline.pipeline import CHOICES, Pipeline
from corefit.pipeline.reader import Reader
from corefit.system.files import json_digest, portable, source
from corefit.types import ROUNDING, Backbone, KeyedReward, Reward, Weighted, key_of
from corefit.types.stage import Stage

OUTPUT_KEYS = ("log_every", "checkpoint_every", "keep", "sample_every")
"""Keys of a stage that change its output and checkpoints, not its weights."""
FILES = ("path", "transformer")
"""Keys of [backbone] that name weights, which are hashed themselves."""
CHANGED: Mapping[str, str] = {
    "weights": "backbone weights changed",
    "dataset": "its data changed",
    "model": "its weights changed",
    "prompts": "the prompts changed",
    "drift": "the data of drift changed",
}
"""What messages say when a part that is itself a hash has changed."""
NAMED = 3
"""How many differences a message names; the rest is counted."""


@frozen
class Identity:
    """Everything that determines a result, as nested JSON."""

    parts: Mapping[str, Any]
    rounding: Mapping[str, Any] = field(factory=dict[str, Any], eq=False)
    """Key -> value of the keys that change rounding alone; they are not part of the hash."""
    former: Mapping[str, Any] = field(factory=dict[str, Any], eq=False)
    """The parts as version 0.1 had them, which included rounding; they recognize what version 0.1 has written."""

    @staticmethod
    def of(parts: Mapping[str, Any], rounding: Mapping[str, Any], former: Mapping[str, Any]) -> Identity:
        """Make an identity; `former` are the parts that were different in version 0.1."""
        return Identity(*json.loads(json.dumps([parts, rounding, {**parts, **former}], default=str)))

    @property
    def hash(self) -> str:
        return json_digest(self.parts)

    def matches(self, record: Mapping[str, Any]) -> bool:
        """Return whether done.json or scores.json has this identity; keys that change rounding alone may differ."""
        return record["identity"] == (self.hash if "rounding" in record else json_digest(self.former))

    def rounding_changes(self, former: Mapping[str, Any] | None) -> str:
        """Return what differs from the `former` rounding, if that is known, in a few words; "" if nothing does."""
        if former is None:
            return ""
        keys = [*self.rounding, *(key for key in former if key not in self.rounding)]
        return ", ".join(text for key in keys for text in _changes(key, former.get(key), self.rounding.get(key)))

    def changes_since(self, former: Mapping[str, Any]) -> str:
        """Return what differs from the former parts, in a few words."""
        found = differences(former, self.parts)
        more = [f"and {len(found) - NAMED} more"] if len(found) > NAMED else []
        return ", ".join([*found[:NAMED], *more])


def of_base(pipeline: Pipeline) -> Identity:
    """Return what determines the weights that the first stage starts from."""
    tables, rounding, former = _tables(pipeline, pipeline.backbone, "backbone", FILES)
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
    """Return what determines a stage's weights.

    before     identity of the weights that it starts from, whichever way the pipeline file names them
    dataset    cache key of its encoded data
    precision  "fp32" or "bf16"
    """
    trained = attrs.evolve(stage, held_out=(), alarm=None)  # what is held out has no part in the weights
    tables, rounding, former = _tables(pipeline, trained, without=(*OUTPUT_KEYS, "train", "from", "held_out"))
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
            "code": _code(pipeline, stage if stage.ends_on_alarm else trained),
            **({"alarm": _alarm(pipeline, stage)} if stage.ends_on_alarm else {}),
            **_scores_keys(stage.reward),
        },
        {**rounding, **_tables(pipeline, pipeline.backbone, "backbone")[1]},
        {"before": _origin(before, before.former), "stage": former},
    )


def of_scores(pipeline: Pipeline, weights: Identity, prompts: str, held: str, dataset: str) -> Identity:
    """Return what determines the held-out scores of weights.

    dataset  cache key of the encoded data, on which drift is measured
    prompts  cache key of the encoded prompts
    held     dtype of the weights that do not train, "" where nothing is computed in bfloat16
    """
    assert pipeline.eval is not None, "without [eval] nothing is evaluated"
    return of_benchmark(pipeline, pipeline.eval, weights, prompts, held, dataset)


def of_model(evaluation: Evaluation, backbone: Backbone, lora: Mapping[str, str]) -> Identity:
    """Return what determines the weights of a model that is evaluated; `lora` maps the files of its LoRA to hashes."""
    tables, rounding, _ = _tables(evaluation, backbone, "backbone", FILES)
    parts = {"weights": backbone.weights_key(), "lora": lora, "backbone": tables, "code": _code(evaluation, backbone)}
    return Identity.of(parts, rounding, {})


def of_benchmark(
    pipeline: Pipeline | Evaluation, eval: Eval, weights: Identity, prompts: str, held: str, dataset: str = ""
) -> Identity:
    """Return what determines the scores of weights by the settings of `eval`; the others are as in `of_scores`."""
    drawn = ("samples",) if eval.reward else ()  # without a reward the samples are all that is made
    tables, rounding, former = _tables(pipeline, eval, "eval", ("name", "prompts", "seed", *drawn))
    return Identity.of(
        {
            "model": weights.hash,
            "prompts": prompts,
            **({"drift": dataset} if eval.drift else {}),
            "corefit": corefit.__version__,
            "seed": eval.seed,
            **({"weights held in": held} if held else {}),
            "eval": tables,
            "code": _code(pipeline, eval),
            **_scores_keys(eval.reward),
        },
        rounding,
        {"model": json_digest(weights.former), "eval": former},
    )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return what differs, a few words for each; if a stage starts from another one, that difference alone."""
    if old == new:
        return []
    if not old:
        return ["what determined the former one is not known"]
    was, now = old.get("before", {}), new.get("before", {})
    if origin := _origin_changes(was, now):
        return [origin]
    shown = {"seed": "eval.seed"} if "eval" in new else {}  # scores have had the seed at the top since version 0.1
    parts = [name for name in new if name != "before"]
    found = [text for name in parts for text in _part_changes(shown.get(name, name), old.get(name), new[name])]
    found = list(dict.fromkeys([*differences(was, now), *found]))
    return found or [_source_changes(old.get("code", {}), new.get("code", {}))]


# parts


def _alarm(pipeline: Pipeline, stage: Stage) -> dict[str, Any]:
    """Return what determines the step in which an alarm ends a stage: also which steps are logged."""
    tables = _tables(pipeline, stage)[0]
    logged = {key: tables[key] for key in ("log_every", "sample_every") if key in tables}
    return {"held_out": tables["held_out"], **tables["alarm"], **logged, **_scores_keys(stage.held_out)}


def _origin(before: Identity, parts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a stage's name and hash; for the base all of its `parts`, so that messages can name a difference."""
    stage = before.parts.get("stage")
    return {"stage": stage["name"], "identity": json_digest(parts)} if stage else parts


def _tables(
    pipeline: Pipeline | Evaluation, value: Any, path: str = "", without: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the table of a value at `path`: keys that determine results, keys that change rounding alone, and all.

    without  keys of the value that are left out of all three
    """
    absolute = Reader(pipeline.host, pipeline.folder, CHOICES).tables(value)
    former = {key: copy.deepcopy(inner) for key, inner in absolute.items() if key not in without}
    tables = portable(absolute, pipeline.folder)  # the project may move as a whole
    rounding = dict(_rounding(value, tables, path))
    return {key: inner for key, inner in tables.items() if key not in without}, rounding, former


def _rounding(value: Any, table: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Remove the keys that change rounding alone from a table and its inner ones; yield ('objective.chunk', value)."""
    if isinstance(value, (list, tuple)):
        for number, (item, inner) in enumerate(zip(value, table, strict=True)):  # pyright: ignore[reportUnknownVariableType,reportUnknownArgumentType]
            label = _entry_name(inner) or number  # pyright: ignore[reportUnknownArgumentType]
            yield from _rounding(item, inner, f"{path}.{label}")
        return
    if isinstance(value, Weighted):  # its keys are in the plugin's own table
        value = value.value
    for each in fields(type(value)) if has(type(value)) else ():
        if each.init and each.metadata.items() >= ROUNDING.items():
            yield f"{path}.{key_of(each.name)}".strip("."), table.pop(key_of(each.name), None)
        elif each.init and key_of(each.name) in table:
            key = key_of(each.name)
            yield from _rounding(getattr(value, each.name), table[key], f"{path}.{key}")


def _code(pipeline: Pipeline | Evaluation, value: Any) -> dict[str, str]:
    """Return package or file -> hash of its source, for `value` and what it holds, except corefit's own classes."""
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


def _scores_keys(entries: Sequence[Weighted[Reward]]) -> dict[str, Any]:
    """Return {"rewards": name -> what else determines its scores}, of rewards that tell it; {} if none does."""
    found = {entry.name: entry.value.scores_key() for entry in entries if isinstance(entry.value, KeyedReward)}
    return {"rewards": found} if found else {}


def _named(pipeline: Pipeline | Evaluation, module: str, file: Path) -> str:
    """Return the package, or a local plugin file relative to the pipeline, since a project may move as a whole."""
    local = file.resolve() in pipeline.host.files
    return os.path.relpath(file.resolve(), pipeline.folder) if local else module


# differences


def _origin_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return how the stage that a later one starts from has changed; "" for the base, whose parts are compared."""
    if old == new or not ("stage" in new or "stage" in old):
        return ""
    if "stage" not in new:
        return f"it starts from the base, not stage {old['stage']}"
    if old.get("stage") != new["stage"]:
        return f"it starts from stage {new['stage']}, not {old.get('stage', 'the base')}"
    return f"stage {new['stage']}, which it starts from, changed"


def _part_changes(name: str, old: Any, new: Any) -> Iterator[str]:
    if name in CHANGED:
        yield from [CHANGED[name]] if old != new else []
    elif name == "code":
        # if a module was added or removed, a key has changed, too, and that is named
        both = sorted((old or {}).keys() & (new or {}).keys())
        yield from (f"code of {module} changed" for module in both if old[module] != new[module])
    elif name == "rewards":
        both = sorted((old or {}).keys() & new.keys())
        yield from (f"what scores as {reward} changed" for reward in both if old[reward] != new[reward])
    else:
        yield from _changes("" if name == "stage" else name, old, new)


def _source_changes(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Return the change where all keys are the same: a plugin of the same name comes from another package or file."""
    new_names, old_names = (", ".join(sorted(one.keys() - other.keys())) for one, other in ((new, old), (old, new)))
    return f"code of {new_names}, formerly of {old_names}" if new_names and old_names else "what determines it changed"


def _changes(path: str, old: Any, new: Any) -> Iterator[str]:
    """Yield 'optimizer.lr 0.001 -> 0.0005' for every key under `path` that differs."""
    if old == new:
        return
    if _uses(old) and _uses(old) == _uses(new):
        old, new = _by_use(old), _by_use(new)
    if isinstance(old, Mapping) and isinstance(new, Mapping) and _uses(old) == _uses(new):
        for key in (*new, *(key for key in old if key not in new)):
            yield from _changes(f"{path}.{key}".strip("."), old.get(key), new.get(key))
    else:
        yield f"{path} {_text(old)} -> {_text(new)}"


def _by_use(value: Any) -> Any:
    """Return a list of tables as a table by their `name` or `use`, as --set writes their keys."""
    return {_entry_name(item): item for item in value} if isinstance(value, Sequence) else value


def _entry_name(item: Any) -> Any:
    """Return what an entry of a list is called, its `name` or else its `use`; None if it has neither."""
    return item.get("name", item.get("use")) if isinstance(item, Mapping) else None


def _uses(value: Any) -> Sequence[str]:
    """Return the `use` of a table, or of each table in a list; an empty list for anything else."""
    if isinstance(value, Mapping):
        return [value["use"]] if "use" in value else []
    items = value if isinstance(value, list) else []
    return [str(_entry_name(item)) for item in items if isinstance(item, Mapping) and "use" in item]


def _text(value: Any) -> str:
    """Return a value as messages show it: a table by its `use`, long text cut."""
    if used := _uses(value):
        return ", ".join(used)
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
