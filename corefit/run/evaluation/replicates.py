"""What runs with several seeds hold: for each stage and seed its scores, its costs, and what determined its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen

from corefit.errors import ConfigError, counted
from corefit.run import identity, plan, report
from corefit.run.evaluation import comparable
from corefit.run.evaluation.comparable import Evaluated
from corefit.run.report.page.folder import BASE, RunFolder, StageFiles, read_run
from corefit.run.report.page.memo import Memo
from corefit.system.display import Display

COSTS = ("seconds", "samples_per_second", "peak_memory", "survived")
DIGITS = 6
"""Significant digits of what is compared and kept: data.json.gz would be twice as large with all of them."""
ROUNDED = ("micro_batch", "copies", "chunk")
"""Keys in pipeline.toml that change rounding alone; done.json lists them apart."""
NAMED = 4
"""Names that a message lists; the rest is counted."""


@frozen(eq=False)
class Replicate:
    """A stage, or the base, as the run with one seed left it."""

    evaluated: Evaluated
    seed: int
    settings: Mapping[str, Any] = field(factory=dict[str, Any])
    """What determines its weights besides the seed and what it starts from; nothing for the base."""
    code: Mapping[str, str] = field(factory=dict[str, str])
    """The version of corefit, and the hash of each plugin's source, that trained it."""
    costs: Mapping[str, float] = field(factory=dict[str, float])

    @property
    def name(self) -> str:
        return self.evaluated.files.name

    @property
    def start(self) -> str:
        return self.evaluated.files.start


@frozen(eq=False)
class Source:
    """What one run's folder, or one data.json.gz, has for a comparison; each stage comes after what it starts from."""

    place: Path
    replicates: Sequence[Replicate]
    base: Mapping[str, Any]
    """What determines the base's weights."""
    units: Mapping[str, str]
    """Metric -> its reward's unit; files of version 0.1 tell none."""


def rounded(value: Any) -> Any:
    """Return a number, or nested lists of them, with at most six digits; whole ones as integers."""
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(value, float) or value != value or abs(value) == float("inf"):
        return value
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 10**15 else short


def of_run(place: Path, memo: Memo, display: Display) -> Source | None:
    """Read the folder of a run, as far as it has come; None, and a line about it, where nothing is evaluated yet."""
    run = read_run("", place.resolve(), memo)
    if "seed" not in run.pipeline:
        raise ConfigError(f"{place} has no pipeline.toml that can be read, and so no seed; run its pipeline again")
    seed, found, waiting = int(run.pipeline["seed"]), dict[str, Replicate](), list[str]()
    trained: dict[str, str] = {}
    for stage in run.stages:
        evaluated = comparable.read(stage)
        done = plan.read(stage.folder / plan.DONE)[0]
        parts: Mapping[str, Any] = done.get("parts", {})
        trained[stage.name] = str(done.get("identity", ""))
        if evaluated is None or (stage.name != BASE and stage.start not in found):
            waiting.append(stage.name)
        elif former := _former(stage, parts, seed, trained):
            display.print(f"{comparable.shown(stage.folder)} is left out: {former}; its run has to train it again")
        else:
            found[stage.name] = _replicate(evaluated, run, seed, done)
    names = [str(entry["name"]) for entry in run.pipeline.get("stage", ())]
    waiting += [name for name in names if name not in {stage.name for stage in run.stages}]
    if waiting:
        listed = ", ".join(waiting[:NAMED]) + (f" and {len(waiting) - NAMED} more" if len(waiting) > NAMED else "")
        display.print(f"{place}: {counted(len(waiting), 'stage')} without scores yet: {listed}")
    units = {row["metric"]: row["unit"] for row in run.rows if "unit" in row}
    return Source(place, [*found.values()], _base_of(run, found), units) if found else None


def _former(stage: StageFiles, parts: Mapping[str, Any], seed: int, trained: Mapping[str, str]) -> str:
    """Say why what is in a stage's folder is not of the pipeline in its run's folder, "" if it is."""
    if parts.get("seed", seed) != seed:
        return f"it was trained with seed {parts['seed']}, and the run's is {seed} now"
    before = parts.get("before", {}).get("identity", "")
    if before and trained.get(stage.start) and before != trained[stage.start]:
        return f"stage {stage.start}, which it starts from, was trained anew"
    return ""


def _replicate(evaluated: Evaluated, run: RunFolder, seed: int, done: Mapping[str, Any]) -> Replicate:
    """Return a stage with its numbers rounded."""
    parts: Mapping[str, Any] = done.get("parts", {})
    about, name = evaluated.files.about, evaluated.files.name
    entry = next((each for each in run.pipeline.get("stage", ()) if each.get("name") == name), {})
    settings = _trained(parts) if "stage" in parts else _planned(entry, run.pipeline)
    costs: dict[str, float] = {key: about[key] for key in COSTS if about.get(key) is not None}
    if entry:
        costs["steps"] = done.get("alarm", {}).get("step", entry["steps"])
        costs["samples"] = costs["steps"] * entry["batch"]
    drift: dict[str, Any] = {key: rounded(value) for key, value in evaluated.drift.items()}
    values = {metric: rounded(column) for metric, column in evaluated.values.items()}
    blocks = [evolve(b, values={name: rounded(column) for name, column in b.values.items()}) for b in evaluated.blocks]
    return Replicate(
        evolve(evaluated, values=values, blocks=blocks, drift=drift),
        seed,
        {} if name == BASE else settings,
        {"corefit": parts["corefit"], **parts.get("code", {})} if "corefit" in parts else {},
        {key: rounded(float(value)) for key, value in costs.items()},
    )


def _trained(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stage's settings from done.json, which says what was trained."""
    kept = {key: parts[key] for key in ("stage", "train", "data", "dataset", "precision", "alarm") if key in parts}
    return _filled({**kept, "stage": _without(parts["stage"], ("name",))})


def _planned(entry: Mapping[str, Any], pipeline: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stage's settings from pipeline.toml, which says what was to be trained."""
    stage = _without(entry, ("name", "from", "train", "held_out", *identity.OUTPUT_KEYS, *ROUNDED))
    train = entry.get("train", pipeline.get("backbone", {}).get("train"))
    return _filled({"stage": stage, "train": train, "data": {"order": pipeline.get("data", {}).get("order")}})


def _without(table: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Return a table without some keys, and its objective without them."""
    kept = {key: value for key, value in table.items() if key not in keys}
    if "objective" in kept:
        kept["objective"] = {key: value for key, value in kept["objective"].items() if key not in keys}
    return kept


def _filled(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return tables without what pipeline.toml leaves out: None, and empty lists and tables."""
    inner = {key: _filled(value) if isinstance(value, Mapping) else value for key, value in table.items()}  # pyright: ignore[reportUnknownArgumentType]
    return {key: value for key, value in inner.items() if value not in (None, [], {}, ())}


def _base_of(run: RunFolder, found: Mapping[str, Replicate]) -> dict[str, Any]:
    """Return what determines the base's weights: its model's hash, and of a trained run the hash of its weights."""
    base: dict[str, Any] = {"model": found[BASE].evaluated.parts.get("model")} if BASE in found else {}
    for stage in run.stages:
        before = plan.read(stage.folder / plan.DONE)[0].get("parts", {}).get("before", {})
        if "weights" in before:
            return base | {"weights": before["weights"], "backbone": before.get("backbone", {})}
    return base


# whether they are replicates


def refuse_unlike(sources: Sequence[Source]) -> None:
    """Raise ConfigError unless the sources differ in nothing but the seed: prompts, noise, bases and settings."""
    first, *others = [each.evaluated for source in sources for each in source.replicates]
    comparable.refuse_unlike(first, others)
    for other in others:
        was, now = ({"eval": _sampling(each)} for each in (first, other))
        if changes := identity.differences(was, now):
            raise ConfigError(
                f"{other.place} was not evaluated as {first.place} was: {', '.join(changes)}; give both the same "
                f"[eval] and {comparable.AGAIN}"
            )
    for source in sources[1:]:
        if not _same_base(sources[0].base, source.base):
            raise ConfigError(
                f"{source.place} started from another base than {sources[0].place}; runs with several seeds of one "
                "pipeline start from the same weights"
            )
    firsts: dict[str, Replicate] = {}
    for each in (each for source in sources for each in source.replicates):
        _refuse_other_settings(firsts.setdefault(each.name, each), each)


def _sampling(evaluated: Evaluated) -> Mapping[str, Any]:
    """Return how samples were made: the keys of [eval] that change every metric."""
    return {key: value for key, value in evaluated.eval.items() if key not in (*comparable.COUNTED, "drift")}


def _same_base(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    """Compare the weights where both are known: code that has changed changes the hash of a model, too."""
    keys = ("weights", "backbone") if "weights" in one and "weights" in two else ("model",)
    return all(one.get(key) == two.get(key) for key in keys)


def _refuse_other_settings(first: Replicate, other: Replicate) -> None:
    both = [key for key in first.settings if key in other.settings]
    was, now = ({key: each.settings[key] for key in both} for each in (first, other))
    changes = [f"it starts from {other.start}, not {first.start}"] if first.start != other.start else []
    changes += identity.differences(was, now)
    if changes:
        listed = ", ".join(changes[: identity.NAMED])
        more = f" and {len(changes) - identity.NAMED} more" if len(changes) > identity.NAMED else ""
        raise ConfigError(
            f"stage {first.name} of seed {other.seed} in {other.evaluated.place} is not that of seed {first.seed} in "
            f"{first.evaluated.place}: {listed}{more}; runs with several seeds may differ in the seed alone"
        )


def differences(sources: Sequence[Source]) -> list[str]:
    """Return what may be known but is no reason to refuse: other versions, code and bases, a sentence for each run."""
    firsts: dict[str, Replicate] = {}
    bases: dict[int, Replicate] = {}
    said: dict[tuple[Path, str], str] = {}
    for each in (each for source in sources for each in source.replicates):
        first = firsts.setdefault(each.name, each)
        if not each.start and (unlike := _unlike(base := bases.setdefault(each.seed, each), each)):
            more = f" and {counted(len(unlike) - 1, 'other metric')}" if unlike[1:] else ""
            text = (
                f"{each.evaluated.place} has other values of {unlike[0]}{more} than {base.evaluated.place}, as another "
                "machine or other versions may give them; the latter are taken"
            )
            said.setdefault((each.evaluated.run, "base"), text)
        for line in comparable.differences(first.evaluated, [each.evaluated]):
            said.setdefault((each.evaluated.run, "evaluated"), line)
        if both := sorted(name for name in first.code.keys() & each.code.keys() if first.code[name] != each.code[name]):
            text = f"{each.evaluated.place} was trained with other code than {first.evaluated.place}: {', '.join(both)}"
            said.setdefault((each.evaluated.run, "trained"), text)
    return [*said.values()]


# one replicate for each stage and seed


def merged(sources: Sequence[Source]) -> list[Replicate]:
    """Return the replicates by stage, in the order of the pipelines, and by seed.

    A stage and seed that several sources have is one; where their values differ, ConfigError names both. The base has
    the same weights in all sources, so that only rounding can differ: its values are those of the first source.
    """
    found: dict[tuple[str, int], Replicate] = {}
    order: list[str] = []
    for source in sources:
        last = -1
        for each in source.replicates:
            if each.name not in order:
                order.insert(last + 1, each.name)
            last = order.index(each.name)
            key = (each.name, each.seed)
            found[key] = _joined(found[key], each) if key in found else each
    return sorted(found.values(), key=lambda each: (order.index(each.name), each.seed))


def _unlike(one: Replicate, two: Replicate) -> list[str]:
    """Return the metrics, and "drift", that both have with different values."""
    columns, others = one.evaluated.columns, two.evaluated.columns
    unlike = [name for name in columns if name in others and [*columns[name]] != [*others[name]]]
    return unlike + (["drift"] if one.evaluated.drift and two.evaluated.drift not in ({}, one.evaluated.drift) else [])


def _joined(one: Replicate, two: Replicate) -> Replicate:
    """Return one stage of one seed from two sources, with the metrics of both."""
    if one.start and (unlike := _unlike(one, two)):
        raise ConfigError(
            f"{one.evaluated.place} and {two.evaluated.place} both have stage {one.name} of seed {one.seed}, with "
            f"different values of {unlike[0]}; leave one of them out, or run it with another seed"
        )
    blocks = [
        first if first.values else report.Block(second.rows, second.values)
        for first, second in zip(one.evaluated.blocks, two.evaluated.blocks, strict=True)
    ]
    values, drift = {**two.evaluated.values, **one.evaluated.values}, one.evaluated.drift or two.evaluated.drift
    return evolve(one, evaluated=evolve(one.evaluated, values=values, blocks=blocks, drift=drift))
