"""What a run has done and what it has yet to do: decided here, for the run itself and for `corefit run --dry-run`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from attrs import define, field, frozen

from corefit.errors import ConfigError, DataError, near
from corefit.pipeline.pipeline import Pipeline, Stage
from corefit.run import identity
from corefit.run.evaluate import KEPT
from corefit.run.identity import Identity
from corefit.system import files
from corefit.train import checkpoint

DONE = "done.json"
COPY = "done.copy.json"
"""A second done.json beside the first: what a stage is must not hang on one small file."""
SCORES = "scores.json"
FROM = "from.json"
BASE = "base"
MODEL = "model"
SUPERSEDED = "superseded"
FORMER = (
    {"identity", "parts", "finished"},
    {"identity", "parts", "finished", "cost", "model"},
    {"identity", "parts", "values", "categories"},
    {"stage", "left"},
)
"""Keys of done.json (of an interrupted and of a finished stage), scores.json and from.json before they had digests."""


@frozen
class Target:
    """A folder of a run, and what its weights and scores are once it is finished."""

    name: str
    """The stage's, or BASE."""
    folder: Path
    weights: Identity
    scores: Identity | None
    """None where nothing is judged."""


@frozen
class Choice:
    """What becomes of what a folder holds.

    use    it is what is wanted, and used as it is
    aside  it is something else, and moves to superseded/ before anything is written
    why    it is not used, in a few words
    going  what changed that changes rounding alone, where an interrupted stage goes on with it
    harm   what is wrong with done.json or scores.json, where a run must say so
    kept   done.json or scores.json as it was written
    """

    use: bool = False
    aside: bool = False
    why: str = ""
    going: str = ""
    harm: str = ""
    kept: Mapping[str, Any] = field(factory=dict[str, Any])


def targets(pipeline: Pipeline, dataset: str, prompts: str | None, precision: str) -> list[Target]:
    """Of the base and of every stage.

    dataset, prompts  keys of what is encoded; prompts None without [eval]
    precision         "fp32" or "bf16"
    """
    weights = identity.of_base(pipeline)
    found = [_target(pipeline, pipeline.stage[0], 0, weights, prompts, precision)]
    for number, stage in enumerate(pipeline.stage, 1):
        weights = identity.of_stage(pipeline, stage, weights, dataset, precision)
        found.append(_target(pipeline, stage, number, weights, prompts, precision))
    return found


def _target(
    pipeline: Pipeline, stage: Stage, number: int, weights: Identity, prompts: str | None, precision: str
) -> Target:
    """The folder of a stage, or, of number 0, of the base, which is judged as the first stage finds it."""
    name = stage.name if number else BASE
    held = "" if precision == "fp32" else "bfloat16" if pipeline.freezes_in_half(stage) else "float32"
    scores = None if prompts is None else identity.of_scores(pipeline, weights, prompts, held)
    return Target(name, pipeline.run_folder / f"{number:02d}-{name}", weights, scores)


def training(target: Target, again: Again) -> Choice:
    """Whether a stage is used as it is, goes on from its newest checkpoint, or is trained anew."""
    folder = target.folder
    if _untouched(folder):
        return Choice(why="not trained yet")
    kept, harm = _noted(target)
    if folder.name in again.left:
        return Choice(aside=True, why=f"--from {again.stage}")
    if not kept:
        return Choice(aside=True, why=harm, harm=harm)
    if not target.weights.fits(kept):
        return Choice(aside=True, why=target.weights.since(kept["parts"]), harm=harm)
    rounded = target.weights.rounded(kept.get("rounding"))
    going = f"with {rounded}, which changes rounding alone" if rounded else ""
    if not kept["finished"]:
        return Choice(why=harm or "it was interrupted", going=going, harm=harm)
    changed = damage(folder / MODEL, kept["model"])
    return Choice(use=not changed, why=changed, going=going, harm=harm, kept=kept)


def _noted(target: Target) -> tuple[Mapping[str, Any], str]:
    """What done.json says, and what is wrong with the file; then its copy says it, or the newest checkpoint does."""
    kept, harm = read(target.folder / DONE)
    if not harm:
        return kept, ""
    if copy := read(target.folder / COPY)[0]:
        return copy, harm
    newest, _ = checkpoint.latest(target.folder / "checkpoints")
    if newest and newest.info.get("identity") == target.weights.hash:
        return {"identity": target.weights.hash, "finished": False, "rounding": target.weights.rounding}, harm
    return {}, harm


def note(target: Target, said: Mapping[str, Any]) -> None:
    """Write done.json of a stage's folder, and its copy: whose weights these are, and what is `said` of them."""
    for name in (COPY, DONE):  # a kill in between leaves a stage that is not finished, and is finished once more
        whose = {"parts": target.weights.parts, "rounding": target.weights.rounding}
        files.write_json(target.folder / name, {**whose, **said, "identity": target.weights.hash})


def judging(target: Target, *, emptied: bool = False) -> Choice:
    """Whether the held-out scores in a folder are used; `emptied` where its stage moves aside first."""
    assert target.scores is not None, "without [eval] nothing is judged"
    file = target.folder / SCORES
    if emptied or not file.exists():
        return Choice(why="not judged yet")
    kept, harm = read(file)
    if harm:
        return Choice(why=harm, harm=harm)
    if not target.scores.fits(kept):
        return Choice(why=target.scores.since(kept["parts"]))
    samples = target.folder / "samples" / KEPT
    if not samples.is_file():
        return Choice(why="its samples are missing")
    harmed = "samples" in kept and _hash(samples) != kept["samples"]
    why = f"samples/{KEPT} is damaged: its sha256 is not the one in {SCORES}" if harmed else ""
    return Choice(use=not harmed, why=why, harm=why, kept=kept)


def put_aside(folder: Path) -> Path:
    """Move a stage's folder to superseded/, under its name and a number; where it is then."""
    aside = folder.parent / SUPERSEDED
    aside.mkdir(exist_ok=True)
    free = next(to for n in count(1) if not (to := aside / f"{folder.name}-{n}").exists())
    folder.rename(free)
    for changed in (aside, folder.parent):
        files.sync(changed)
    return free


def _untouched(folder: Path) -> bool:
    """Nothing is there, or only what a kill left of the first files."""
    return not folder.exists() or all(f.name == COPY or f.name.endswith(".part") for f in folder.iterdir())


# `run --from`


@define
class Again:
    """`run --from STAGE`, in from.json of the run's folder until the run ends, so that a killed one goes on.

    stage  as it was asked for; "" where nothing was
    left   names of the folders that have yet to move aside
    """

    file: Path
    stage: str = ""
    left: tuple[str, ...] = ()

    @staticmethod
    def of(pipeline: Pipeline, stage: str = "") -> Again:
        """What was begun before, with what is asked for now; asking for the same goes on with it."""
        file = pipeline.run_folder / FROM
        found = Again(file)
        if file.exists():
            kept, harm = read(file)
            if harm and not stage:
                raise DataError(
                    f"{file}: {harm}. It said which stages were to run again: say so once more, with --from STAGE; "
                    "where none is, move the file away"
                )
            if harm:
                return Again(file, stage, _folders(pipeline, stage))
            found = Again(file, kept["stage"], tuple(kept["left"]))
        if stage in ("", found.stage):
            return found
        return Again(file, stage, _folders(pipeline, stage, found.left))

    def keep(self) -> None:
        """Write it, if there is anything to go on with."""
        if self.stage:
            files.write_json(self.file, {"stage": self.stage, "left": self.left})

    def moved(self, name: str) -> None:
        """A folder has moved aside, or was never there."""
        if name in self.left:
            self.left = tuple(other for other in self.left if other != name)
            self.keep()

    def end(self) -> None:
        """The run has ended, and nothing is left to do: the next --from is a new one."""
        self.file.with_name(f".{FROM}.part").unlink(missing_ok=True)
        self.file.unlink(missing_ok=True)


def _folders(pipeline: Pipeline, stage: str, also: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of the folders of a stage and of those after it, and which of `also` come before."""
    names = [f"{number:02d}-{s.name}" for number, s in enumerate(pipeline.stage, 1)]
    first = [s.name for s in pipeline.stage].index(stage)
    return tuple(name for number, name in enumerate(names) if number >= first or name in also)


def check_stage(pipeline: Pipeline, name: str) -> None:
    """ConfigError where the pipeline has no stage `name`; "" is none."""
    names = [stage.name for stage in pipeline.stage]
    if name and name not in names:
        raise ConfigError(
            f"--from {name}: there is no stage {name!r}{near(name, names)}; there are: {', '.join(names)}"
        )


# the dry listing


def listing(pipeline: Pipeline, found: Sequence[Target], again: Again, prompts: int) -> Iterator[tuple[str, str]]:
    """(what, what would happen and why) of base and stages, in order; `prompts` are those that are judged."""
    base, *stages = found
    yield from _judged(base, prompts)
    for stage, target in zip(pipeline.stage, stages, strict=True):
        choice = training(target, again)
        yield target.folder.name, _trained(stage, target.folder, choice)
        yield from _judged(target, prompts, emptied=choice.aside)


def _judged(target: Target, prompts: int, *, emptied: bool = False) -> Iterator[tuple[str, str]]:
    if target.scores is not None:
        choice = judging(target, emptied=emptied)
        said = "judged before" if choice.use else f"on {counted(prompts, 'held-out prompt')}: {choice.why}"
        yield f"judge {target.name}", said


def _trained(stage: Stage, folder: Path, choice: Choice) -> str:
    steps = counted(stage.steps, "step")
    if choice.use:
        return f"use as it is: finished, {steps}{f'; {choice.harm}, its copy is not' if choice.harm else ''}"
    if choice.aside:
        return f"train {steps}: {choice.why} (the former one goes to {SUPERSEDED}/)"
    newest, damaged = checkpoint.latest(folder / "checkpoints")
    past = f", {choice.going}" if choice.going else ""
    past += f"; {counted(len(damaged), 'newer checkpoint')} damaged" if damaged else ""
    if newest is None:
        return f"train {steps}: {choice.why}{past}"
    return f"go on from step {newest.step} of {stage.steps}: {choice.why}{past}"


def counted(n: int, noun: str) -> str:
    """'1 step', '2 steps'."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


# files


def read(file: Path) -> tuple[dict[str, Any], str]:
    """The content of done.json, scores.json or from.json, and what is wrong with the file; one of the two is empty."""
    try:
        return files.read_json(file, _is_former), ""
    except FileNotFoundError:
        return {}, f"its {file.name} is missing"
    except files.Damaged as error:
        return {}, f"its {file.name} is damaged ({error})"


def _is_former(content: Mapping[str, Any]) -> bool:
    """Whether it is a whole file of a corefit that wrote no digests; what an identity is of proves the identity."""
    whole = set(content) in FORMER and content.get("finished", False) == ("model" in content)
    if "left" in content:
        names = [content["stage"], *content["left"]] if isinstance(content["left"], list) else [None]
        return whole and all(isinstance(name, str) for name in names)
    return whole and ("parts" not in content or files.json_digest(content["parts"]) == content["identity"])


def hashes(folder: Path) -> dict[str, str]:
    """Relative name -> sha256 of every file."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): _hash(file) for file in files}


def damage(folder: Path, expected: Mapping[str, str]) -> str:
    """Which of the `hashes` does not hold any more, in a few words, or nothing. Reads all files, once a process."""
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
    """What a file holds while it is not written to; hard links to it are the same."""

    device: int
    inode: int
    size: int
    modified: int
    file: Path = field(eq=False)


@cache
def _hash_of(version: _Version) -> str:
    return files.sha256(version.file)
