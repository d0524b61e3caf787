"""Decides what of a run is done and what is still to do, for the run itself and for `corefit run --dry-run`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from attrs import define, field, frozen

from corefit.errors import ConfigError, DataError, counted, near
from corefit.pipeline.pipeline import BASE, Pipeline, Stage
from corefit.run import identity
from corefit.run.evaluation.evaluator import SAMPLES
from corefit.run.identity import Identity
from corefit.system import files
from corefit.train import checkpoint

DONE = "done.json"
COPY = "done.copy.json"
"""A copy of done.json, so that damage to one small file does not lose a finished stage."""
SCORES = "scores.json"
RESULTS = "results.json"
DRIFT = "drift.json"
FROM = "from.json"
MODEL = "model"
SUPERSEDED = "superseded"
CARD, PICTURE = "README.md", "samples.jpg"
"""The model card and its picture, which lie beside the weights in `model/`."""
FORMER = (
    {"identity", "parts", "finished"},
    {"identity", "parts", "finished", "cost", "model"},
    {"identity", "parts", "values", "categories"},
    {"stage", "left"},
)
"""The keys of done.json (interrupted, finished), scores.json and from.json before these files had digests."""


@frozen
class Target:
    """The base model or a stage: its folder in the run, and the identities that its weights and scores are to have."""

    name: str
    """The stage's name, or BASE."""
    start: str
    """The name of the target whose weights it starts from; "" for the base."""
    folder: Path
    weights: Identity
    scores: Identity | None
    """None if nothing is evaluated."""


@frozen
class Decision:
    """What happens to the content of a folder.

    reuse      the content is what this run would make, and is used as it is
    supersede  the content is something else, and the folder is moved to superseded/ before anything is written
    reason     why the content is not reused, in a few words
    rounding   the changes with which an interrupted stage continues, because they change rounding alone
    problem    what is wrong with done.json or scores.json, if the run must report it
    record     the content of done.json or scores.json
    """

    reuse: bool = False
    supersede: bool = False
    reason: str = ""
    rounding: str = ""
    problem: str = ""
    record: Mapping[str, Any] = field(factory=dict[str, Any])


def targets(pipeline: Pipeline, dataset: str, prompts: str | None, precision: str) -> list[Target]:
    """Return the targets of the base and of every stage.

    dataset    cache key of the encoded data
    prompts    cache key of the encoded prompts, None without [eval]
    precision  "fp32" or "bf16"
    """
    weights = {BASE: identity.of_base(pipeline)}
    found = [_target(pipeline, pipeline.stage[0], 0, weights[BASE], dataset, prompts, precision)]
    for number, stage in enumerate(pipeline.stage, 1):
        start = weights[start_of(pipeline, stage)]
        weights[stage.name] = identity.of_stage(pipeline, stage, start, dataset, precision)
        found.append(_target(pipeline, stage, number, weights[stage.name], dataset, prompts, precision))
    return found


def start_of(pipeline: Pipeline, stage: Stage) -> str:
    """Return the name of what a stage starts from: that of an earlier stage, or BASE."""
    parent = pipeline.parent(stage)
    return parent.name if parent else BASE


def _target(
    pipeline: Pipeline,
    stage: Stage,
    number: int,
    weights: Identity,
    dataset: str,
    prompts: str | None,
    precision: str,
) -> Target:
    """Return the target of a stage; number 0 is the base, which is evaluated in the dtypes of the first stage."""
    name = stage.name if number else BASE
    held = "" if precision == "fp32" else "bfloat16" if pipeline.freezes_in_half(stage) else "float32"
    scores = None if prompts is None else identity.of_scores(pipeline, weights, prompts, held, dataset)
    start = start_of(pipeline, stage) if number else ""
    return Target(name, start, pipeline.run_folder / f"{number:02d}-{name}", weights, scores)


def decide_training(target: Target, rerun: Rerun) -> Decision:
    """Decide whether a stage is reused, continues from its newest checkpoint, or is trained anew."""
    folder = target.folder
    if _untouched(folder):
        return Decision(reason="not trained yet")
    record, problem = _recorded(target)
    if folder.name in rerun.pending:
        return Decision(supersede=True, reason=f"--from {rerun.stage}")
    if not record:
        return Decision(supersede=True, reason=problem, problem=problem)
    if not target.weights.matches(record):
        return Decision(supersede=True, reason=target.weights.changes_since(record["parts"]), problem=problem)
    changed = target.weights.rounding_changes(record.get("rounding"))
    rounding = f"with {changed}, which changes rounding alone" if changed else ""
    if not record["finished"]:
        return Decision(reason=problem or "it was interrupted", rounding=rounding, problem=problem)
    damaged = damage(folder / MODEL, record["model"])
    return Decision(reuse=not damaged, reason=damaged, rounding=rounding, problem=problem, record=record)


def _recorded(target: Target) -> tuple[Mapping[str, Any], str]:
    """Return the content of done.json and "", or that of its copy or newest checkpoint and what is wrong with it."""
    record, problem = read(target.folder / DONE)
    if not problem:
        return record, ""
    if copy := read(target.folder / COPY)[0]:
        return copy, problem
    newest, _ = checkpoint.latest(target.folder / "checkpoints")
    if newest and newest.info.get("identity") == target.weights.hash:
        return {"identity": target.weights.hash, "finished": False, "rounding": target.weights.rounding}, problem
    return {}, problem


def write_done(target: Target, status: Mapping[str, Any]) -> None:
    """Write done.json of a stage and its copy: the identity of its weights, and their `status`."""
    for name in (COPY, DONE):  # after a kill in between, done.json says unfinished, and the stage is finished again
        identity = {"parts": target.weights.parts, "rounding": target.weights.rounding}
        files.write_json(target.folder / name, {**identity, **status, "identity": target.weights.hash})


def decide_evaluation(target: Target, *, superseded: bool = False) -> Decision:
    """Decide whether the held-out scores in a folder are reused; `superseded` if the folder is moved away first."""
    assert target.scores is not None, "without [eval] nothing is evaluated"
    file = target.folder / SCORES
    if superseded or not file.exists():
        return Decision(reason="not evaluated yet")
    record, problem = read(file)
    if problem:
        return Decision(reason=problem, problem=problem)
    if not target.scores.matches(record):
        return Decision(reason=target.scores.changes_since(record["parts"]))
    samples = target.folder / "samples" / SAMPLES
    if not samples.is_file():
        return Decision(reason="its samples are missing")
    intact = "samples" not in record or _hash(samples) == record["samples"]
    problem = "" if intact else f"samples/{SAMPLES} is damaged: its sha256 is not the one in {SCORES}"
    return Decision(reuse=intact, reason=problem, problem=problem, record=record)


def supersede(folder: Path) -> Path:
    """Move a stage's folder to superseded/, under its name and a free number, and return its new path."""
    parent = folder.parent / SUPERSEDED
    parent.mkdir(exist_ok=True)
    path = next(path for n in count(1) if not (path := parent / f"{folder.name}-{n}").exists())
    folder.rename(path)
    for changed in (parent, folder.parent):
        files.sync(changed)
    return path


def _untouched(folder: Path) -> bool:
    """Return whether the folder is missing, or has only the first files that a killed run was writing."""
    return not folder.exists() or all(f.name == COPY or f.name.endswith(".part") for f in folder.iterdir())


# `run --from`


@define
class Rerun:
    """`run --from STAGE`. It is kept in from.json of the run's folder until the run ends, so that a killed run resumes.

    stage    the STAGE of --from; "" without the option
    pending  names of the folders that still have to be moved to superseded/
    """

    file: Path
    stage: str = ""
    pending: tuple[str, ...] = ()

    @staticmethod
    def load(pipeline: Pipeline, stage: str = "") -> Rerun:
        """Join what an interrupted run has pending to the `stage` given now; the same stage continues that run."""
        file = pipeline.run_folder / FROM
        interrupted = Rerun(file)
        if file.exists():
            record, problem = read(file)
            if problem and not stage:
                raise DataError(
                    f"{file.parent}: {problem}. It recorded which stages were to run again: give --from STAGE again; "
                    "where none is, move the file away"
                )
            if problem:
                return Rerun(file, stage, _folders_from(pipeline, stage))
            interrupted = Rerun(file, record["stage"], tuple(record["left"]))
        if stage in ("", interrupted.stage):
            return interrupted
        return Rerun(file, stage, _folders_from(pipeline, stage, interrupted.pending))

    def write(self) -> None:
        """Write from.json, if --from was given."""
        if self.stage:
            files.write_json(self.file, {"stage": self.stage, "left": self.pending})

    def folder_moved(self, name: str) -> None:
        """Record that a folder has been moved, or did not exist."""
        if name in self.pending:
            self.pending = tuple(other for other in self.pending if other != name)
            self.write()

    def finish(self) -> None:
        """Remove from.json at the end of the run, so that the next --from starts anew."""
        self.file.with_name(f".{FROM}.part").unlink(missing_ok=True)
        self.file.unlink(missing_ok=True)


def _folders_from(pipeline: Pipeline, stage: str, also: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the folder names of a stage and of all that descend from it, and of the other stages those in `also`."""
    names = {f"{number:02d}-{s.name}": s.name for number, s in enumerate(pipeline.stage, 1)}
    again = _descendants(pipeline, stage)
    return tuple(folder for folder, name in names.items() if name in again or folder in also)


def check_stages(pipeline: Pipeline, again: str, only: Sequence[str] = ()) -> None:
    """Raise ConfigError if `--from` or `--only` name a stage that the pipeline has not, or contradict each other.

    again  the STAGE of `--from`, "" if there is none
    """
    names = [stage.name for stage in pipeline.stage]
    for option, name in [*([("--from", again)] if again else []), *(("--only", each) for each in only)]:
        if name not in names:
            raise ConfigError(
                f"{option} {name}: there is no stage {name!r}{near(name, names)}; there are: {', '.join(names)}"
            )
    if again and only:
        left = [name for name in _descendants(pipeline, again) if name not in chosen(pipeline, only)]
        if left:
            raise ConfigError(
                f"--from {again} runs {', '.join(left)} anew, which --only leaves out; name it with --only, too"
            )


def chosen(pipeline: Pipeline, only: Sequence[str]) -> frozenset[str]:
    """Return the names of the stages that `--only` names and of all that they come from; of all stages without it."""
    wanted = [stage for stage in pipeline.stage if not only or stage.name in only]
    return frozenset(each.name for stage in wanted for each in pipeline.lineage(stage))


def is_done(target: Target, rerun: Rerun) -> bool:
    """Return whether a stage is finished and evaluated, so that a run uses all of it as it is."""
    return decide_training(target, rerun).reuse and (target.scores is None or decide_evaluation(target).reuse)


def _descendants(pipeline: Pipeline, name: str) -> list[str]:
    """Return the names of a stage and of all that descend from it."""
    return [s.name for s in pipeline.stage if name in (each.name for each in pipeline.lineage(s))]


# --dry-run


def listing(
    pipeline: Pipeline, found: Sequence[Target], rerun: Rerun, prompts: int, chosen: frozenset[str]
) -> Iterator[tuple[str, str]]:
    """Yield (what, what a run would do and why) for base and stages.

    prompts  the number of held-out prompts
    chosen   the names of the stages that may be trained
    """
    base, *stages = found
    yield from _evaluation_line(base, prompts)
    for stage, target in zip(pipeline.stage, stages, strict=True):
        if target.name not in chosen and not is_done(target, rerun):
            yield target.folder.name, "leave out: --only does not name it"
            continue
        decision = decide_training(target, rerun)
        yield target.folder.name, _training_line(stage, target.folder, decision)
        yield from _evaluation_line(target, prompts, superseded=decision.supersede)


def _evaluation_line(target: Target, prompts: int, *, superseded: bool = False) -> Iterator[tuple[str, str]]:
    if target.scores is not None:
        decision = decide_evaluation(target, superseded=superseded)
        todo = f"on {counted(prompts, 'held-out prompt')}: {decision.reason}"
        yield f"evaluate {target.name}", "evaluated before" if decision.reuse else todo


def _training_line(stage: Stage, folder: Path, decision: Decision) -> str:
    steps, start = counted(stage.steps, "step"), f" from {stage.from_}" if stage.from_ else ""
    if decision.reuse:
        if alarm := decision.record.get("alarm"):
            steps = f"ended by its alarm after step {alarm['step']} of {stage.steps}"
        return f"use as it is: finished, {steps}{f'; {decision.problem}, its copy is not' if decision.problem else ''}"
    if decision.supersede:
        return f"train {steps}{start}: {decision.reason} (the former one goes to {SUPERSEDED}/)"
    newest, damaged = checkpoint.latest(folder / "checkpoints")
    details = f", {decision.rounding}" if decision.rounding else ""
    details += f"; {counted(len(damaged), 'newer checkpoint')} damaged" if damaged else ""
    if newest is None:
        return f"train {steps}{start}: {decision.reason}{details}"
    return f"go on from step {newest.step} of {stage.steps}: {decision.reason}{details}"


# files


def read(file: Path) -> tuple[dict[str, Any], str]:
    """Return the content of done.json, scores.json or from.json, and what is wrong with it; one of the two is empty."""
    try:
        return files.read_json(file, _is_former), ""
    except FileNotFoundError:
        return {}, f"its {file.name} is missing"
    except files.Damaged as error:
        return {}, f"its {file.name} is damaged ({error})"


def _is_former(content: Mapping[str, Any]) -> bool:
    """Return whether a file without a digest is a whole file of an older corefit; the hash of its parts is checked."""
    whole = set(content) in FORMER and content.get("finished", False) == ("model" in content)
    if "left" in content:
        names = [content["stage"], *content["left"]] if isinstance(content["left"], list) else [None]
        return whole and all(isinstance(name, str) for name in names)
    return whole and ("parts" not in content or files.json_digest(content["parts"]) == content["identity"])


def hashes(folder: Path) -> dict[str, str]:
    """Return relative name -> sha256 for every file of a folder with weights, but not for their card."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    names = {file: file.relative_to(folder).as_posix() for file in files}
    return {name: _hash(file) for file, name in names.items() if name not in (CARD, PICTURE)}


def damage(folder: Path, expected: Mapping[str, str]) -> str:
    """Say which file is missing or has another hash than `expected`, or "". Each file is read once per process."""
    for name, digest in expected.items():
        file = folder / name
        if not file.is_file():
            return f"{folder.name}/{name} is missing"
        if _hash(file) != digest:
            return f"{folder.name}/{name} is damaged: its sha256 is not the one in {DONE}"
    return ""


def _hash(file: Path) -> str:
    stat = file.stat()
    return _hash_of(_Version(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, file))


@frozen
class _Version:
    """Identifies the content of a file until it is written to; hard links to one file are equal."""

    device: int
    inode: int
    size: int
    modified: int
    file: Path = field(eq=False)


@cache
def _hash_of(version: _Version) -> str:
    return files.sha256(version.file)
