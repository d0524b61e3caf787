"""Whether evaluations can be compared: which prompts, which noise and which settings they were made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from attrs import field, frozen

from corefit.errors import ConfigError, DataError
from corefit.run import identity, plan, report
from corefit.run.evaluation.evaluator import SAMPLES
from corefit.run.report.page.folder import StageFiles
from corefit.system import files
from corefit.system.display import Display

AGAIN = "run it again, which evaluates alone"
OTHERS = ("model", "prompts", "seed", "rewards")
"""Parts of the identity of scores that are compared one by one."""
COUNTED = ("reward", "limit", "samples", *report.BLOCKS)
"""Keys of [eval] likewise."""


@frozen(eq=False)
class Evaluated:
    """A stage, or the base, and what its scores.json holds."""

    files: StageFiles
    values: Mapping[str, Sequence[float]]
    categories: Sequence[str]
    prompts: Sequence[str]
    """Empty where version 0.1 wrote the file, which knew them by their hash alone."""
    parts: Mapping[str, Any]
    """What determined the scores."""
    samples: str = ""
    """The SHA-256 of the kept samples."""
    blocks: Sequence[report.Block] = ()
    drift: Mapping[str, Any] = field(factory=dict[str, Any])
    """What the exposure-bias meter measured: {"sigmas", "values", "prompts"}, or nothing."""

    @property
    def run(self) -> Path:
        return self.files.folder.parent

    @property
    def place(self) -> Path:
        """The folder as messages show it."""
        return shown(self.files.folder)

    @property
    def eval(self) -> Mapping[str, Any]:
        return self.parts.get("eval", {})

    def measure(self, metric: str) -> Any:
        """Return what determines a metric, besides the samples."""
        if metric in self.values:
            return self._reward(metric)
        key, block = next(found for found in zip(report.BLOCKS, self.blocks, strict=True) if metric in found[1].values)
        return self._reward(metric), [*block.rows], self.eval.get(key) if key == "diversity" else None

    def _reward(self, metric: str) -> Any:
        """Return what determines the scores of the reward that a metric's name is, or begins with."""
        entries = {entry.get("name", entry["use"]): entry for entry in self.eval.get("reward", ())}
        name = next((name for name in entries if f"{metric}, ".startswith(f"{name}, ")), "")
        entry = {key: value for key, value in entries.get(name, {}).items() if key not in ("name", "weight")}
        return entry, self.parts.get("rewards", {}).get(name)

    @property
    def columns(self) -> Mapping[str, Sequence[float]]:
        """The values of all metrics."""
        return dict(chain(self.values.items(), *(block.values.items() for block in self.blocks)))

    @property
    def settings(self) -> Mapping[str, Any]:
        """What else determines the scores: they can be compared where it differs, but that has to be known."""
        eval = {key: value for key, value in self.eval.items() if key not in COUNTED}
        return {**{key: value for key, value in self.parts.items() if key not in OTHERS}, "eval": eval}


@frozen
class Metrics:
    """The metrics that all evaluations have, and a sentence for each that they have not."""

    names: Sequence[str]
    left_out: Sequence[str]


def shown(path: Path) -> Path:
    """Return a path as messages show it: relative where it is below the current folder."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def read(stage: StageFiles) -> Evaluated | None:
    """Read scores.json; None if there is none. Raises DataError if it is damaged."""
    file = stage.folder / plan.SCORES
    if not file.is_file():
        return None
    content, problem = plan.read(file)
    lengths = {len(values) for values in content.get("values", {}).values()} | {len(content.get("categories", ()))}
    if problem or len(lengths) > 1:
        problem = problem or f"its {file.name} has values of different numbers of prompts"
        raise DataError(f"{shown(stage.folder)}: {problem}; run its pipeline again, which evaluates it anew")
    return Evaluated(
        stage,
        content["values"],
        content["categories"],
        content.get("prompts", ()),
        content["parts"],
        content.get("samples", ""),
        report.blocks_of(content),
        content.get("drift") or {},
    )


def refuse_unlike(first: Evaluated, others: Sequence[Evaluated]) -> None:
    """Raise ConfigError unless all have the same prompts, in the same order, and the same noise."""
    for other in others:
        one, two = first.place, other.place
        counts = [len(each.categories) for each in (first, other)]
        seeds = [each.parts.get("seed") for each in (first, other)]
        sizes = [_size(each) for each in (first, other)]
        if counts[0] != counts[1]:
            raise ConfigError(
                f"{two} was evaluated on {counts[1]} held-out prompts, {one} on {counts[0]}; give both the same "
                f"eval.limit and {AGAIN}"
            )
        if not _same_prompts(first, other):
            raise ConfigError(
                f"{two} was evaluated on other held-out prompts than {one}; give both the same eval.prompts and {AGAIN}"
            )
        if list(first.categories) != list(other.categories):
            raise ConfigError(
                f"{two} has other categories of its prompts than {one}; give both the same eval.prompts and {AGAIN}"
            )
        if seeds[0] != seeds[1]:
            raise ConfigError(
                f"{two} was evaluated with seed {seeds[1]}, {one} with seed {seeds[0]}; set eval.seed = {seeds[0]} "
                f"and {AGAIN}"
            )
        if all(sizes) and sizes[0] != sizes[1]:
            raise ConfigError(
                f"{two} was evaluated in size {sizes[1]}, {one} in size {sizes[0]}; give both the same data.size"
            )


def differences(first: Evaluated, others: Sequence[Evaluated]) -> list[str]:
    """Return what else the evaluations differ in, a sentence for each run that does."""
    found: dict[tuple[Path, str], str] = {}
    for other in others:
        changes = identity.differences(first.settings, other.settings)
        if first.parts.get("prompts") != other.parts.get("prompts"):
            changes.append("the prompts were encoded otherwise, and noise is the same only for latents of one shape")
        if changes:
            text = ", ".join(changes)
            found.setdefault((other.run, text), f"{other.place} was not evaluated as {first.place} was: {text}")
    return [*found.values()]


def metrics(every: Sequence[Evaluated]) -> Metrics:
    """Return the metrics that all evaluations have measured alike."""
    has = [each.columns.keys() for each in every]
    named = dict.fromkeys(name for each in every for name in each.columns)
    common, left_out = list[str](), list[str]()
    for name in named:
        lacking = [each for each, has_it in zip(every, has, strict=True) if name not in has_it]
        unlike = [each for each in every if each.measure(name) != every[0].measure(name)] if not lacking else []
        if lacking:
            left_out.append(f"metric {name} is left out: {lacking[0].place} was not scored by it")
        elif unlike:
            where = f"{unlike[0].place} and {every[0].place}"
            left_out.append(f"metric {name} is left out: its keys differ between {where}")
        else:
            common.append(name)
    return Metrics(common, left_out)


def base_difference(first: Evaluated, other: Evaluated, metrics: Sequence[str]) -> str:
    """Return why two bases are not the same, or ""."""
    one, two = shown(first.run), shown(other.run)
    if first.parts.get("model") != other.parts.get("model"):
        return f"{two} started from another base than {one}"
    if first.settings != other.settings:
        return f"the base of {two} was evaluated otherwise than that of {one}"
    columns = [each.columns for each in (first, other)]
    if any(columns[0][name] != columns[1][name] for name in metrics):
        return f"the base of {two} is that of {one}, but was scored in another rounding"
    return ""


def draw(stages: Mapping[str, Evaluated], png: Path, display: Display) -> None:
    """Draw the kept samples of all stages, a row for each that has them."""
    import numpy as np
    from safetensors.numpy import load_file

    media: dict[str, Any] = {}
    for name, stage in stages.items():
        file = _samples(stage)
        if file.is_file() and stage.samples in ("", files.sha256(file)):
            media[name] = load_file(file)["media"].astype(np.float32) / 255
        else:
            display.print(f"{name} has no picture: {shown(file)} is missing or damaged")
    if not media:
        png.unlink(missing_ok=True)
        return
    count = min(len(each) for each in media.values())
    texts = next((stage.prompts for stage in stages.values() if stage.prompts), ())
    prompts = list(texts[:count]) or [f"prompt {number + 1}" for number in range(count)]
    report.comparison([(name, each[:count]) for name, each in media.items()], prompts, png)


def _samples(stage: Evaluated) -> Path:
    return stage.files.folder / "samples" / SAMPLES


def _same_prompts(first: Evaluated, other: Evaluated) -> bool:
    """Compare the prompts, or where a file has none, what they and their encodings are known by."""
    if first.prompts and other.prompts:
        return list(first.prompts) == list(other.prompts)
    return first.parts.get("prompts") == other.parts.get("prompts")


def _size(stage: Evaluated) -> str:
    """Return the size of the kept samples, such as "64x64"; "" if it is not known."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(_samples(stage), framework="numpy") as opened:
            return "x".join(map(str, opened.get_slice("media").get_shape()[2:]))
    except (OSError, SafetensorError):
        return ""
