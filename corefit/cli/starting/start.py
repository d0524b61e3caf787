"""Make a pipeline file from a folder: look at it, choose, fit the choice into memory, and check what is written."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from corefit.cli.starting import choice as chosen
from corefit.cli.starting.choice import Choice
from corefit.cli.starting.fitting import ROOM, Fitted, Fitting
from corefit.cli.starting.survey import Survey, survey
from corefit.cli.starting.text import OBJECTIVES, Written
from corefit.data.settings import Data
from corefit.data.sources import Listed
from corefit.errors import ConfigError, ModelError, counted
from corefit.pipeline.pipeline import CHOICES, Pipeline
from corefit.pipeline.reader import Reader
from corefit.plugins.host import Host
from corefit.system.memory import size as in_words
from corefit.train.estimate import Device
from corefit.types import Example, ModelPath, Preset, Suggested

HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""Matches a model's name on the hub."""
INDEX = "model_index.json"
DROPOUT = 0.1
UNTRIED = 512
"""The side that is chosen where the model's files are not at hand, so that the memory is not known."""


@frozen(kw_only=True)
class Wanted:
    """What was asked for.

    folder     pictures or clips, or a .jsonl file that names them
    memory     bytes of a GPU; None for this machine's device
    backbone   a family; None to choose by the model and the kind of media
    model      a folder, or a name on the hub; None for the family's own suggestion
    trigger    a word that stands for what is learned
    objective  a key of text.OBJECTIVES
    """

    folder: Path
    memory: float | None = None
    backbone: str | None = None
    model: str | None = None
    trigger: str | None = None
    objective: str = "sft"


@frozen
class Family:
    """A backbone, the model to train, and what the family suggests.

    found  the model: the whole path of a folder, or a name on the hub
    local  whether it is a folder
    """

    name: str
    found: str
    local: bool
    suggested: Suggested


@frozen
class Started:
    """The text of pipeline.toml, lines on what was chosen, the command that checks it, and a prompt for samples."""

    text: str
    said: Sequence[str]
    check: str
    prompt: str


def start(wanted: Wanted, name: str, target: Path) -> Started:
    """Return the pipeline file for `wanted`, which is to be written into the folder `target`.

    CorefitError for a folder, a model or a memory that it cannot be made for. What is returned passes `corefit check`,
    unless the model's files are on the hub and cannot be fetched now, which the file and the lines say.
    """
    if wanted.objective not in OBJECTIVES:
        known = ", ".join(OBJECTIVES)
        raise ConfigError(f"--objective {wanted.objective}: {known} learn from a folder; others are yours to write")
    try:
        Data(source=Listed(("",)), trigger=wanted.trigger)
    except ValueError as error:
        raise ConfigError(f"--trigger: {error}") from None
    found = survey(wanted.folder, wanted.trigger)
    host = Host()
    family = _family(host, wanted, clips=bool(found.frames))
    device = Device.here() if wanted.memory is None else Device.of(wanted.memory)
    backbone = host.get("backbones", family.name)(path=ModelPath(family.found))
    unknown = _why_unknown(family, backbone)
    dropout = DROPOUT if unknown or not backbone.distilled else 0.0
    prompts = chosen.prompts(found, wanted.trigger, _captions(found, wanted.trigger))
    draft = Draft(wanted, name, target, found, host, family, dropout, prompts)
    made_for = backbone.usual().size if isinstance(backbone, Preset) and not unknown else family.suggested.size
    sizes = _sizes(found, made_for, None if unknown else backbone)
    fitted = _guessed(sizes) if unknown else Fitting(device, draft.pipeline).fit(sizes)
    memory = _memory(fitted, device, unknown)
    if not unknown:
        draft.pipeline(fitted.choice).check()
    said = _said(draft, fitted.choice, memory, unknown)
    return Started(draft.text(fitted.choice, memory), said, f"check{_option(device)}", prompts[0][0])


@frozen
class Draft:
    """Everything that the file is made of but the choice.

    target   the folder that the file will be in
    dropout  share of captions that are dropped
    prompts  prompts for samples, and what is said about them
    """

    wanted: Wanted
    name: str
    target: Path
    found: Survey
    host: Host
    family: Family
    dropout: float
    prompts: tuple[Sequence[str], str]

    def pipeline(self, choice: Choice) -> Pipeline:
        """Return the pipeline that the file of a choice will be, as read from its text."""
        tables = tomllib.loads(self.text(choice))
        tables["data"]["source"]["path"] = str(_whole(Path(self.found.source["path"])))
        tables["backbone"]["path"] = self.family.found
        made = Reader(self.host, self.target.absolute(), CHOICES).read(tables, Pipeline)
        made.host, made.folder = self.host, self.target.absolute()
        return made

    def text(self, choice: Choice, memory: str = "") -> str:
        """Return the text of the file. `memory` is what it says about memory."""
        return Written(
            name=self.name,
            family=self.family.name,
            model=_relative(Path(self.family.found), self.target) if self.family.local else self.family.found,
            source={**self.found.source, "path": _relative(Path(self.found.source["path"]), self.target)},
            trigger=self.wanted.trigger,
            objective=self.wanted.objective,
            guidance=self.family.suggested.guidance,
            sampling=self.family.suggested.steps,
            dropout=self.dropout,
            prompts=self.prompts,
            memory=memory,
        ).text(self.found, choice)


def _captions(found: Survey, trigger: str | None) -> list[str]:
    """Return the first caption of each picture as it is trained on, "" without one."""
    data = Data(source=Listed(("",)), trigger=trigger)
    firsts = [texts[0] if texts else "" for texts in found.captions]
    return [data.triggered(Example(text)).prompts[0] if text else "" for text in firsts]


# the model


def _family(host: Host, wanted: Wanted, *, clips: bool) -> Family:
    """Return the family that was asked for, that the model's folder is of, or that makes such media."""
    offered = {name: offer.cls for name, offer in host.offers["backbones"].items()}
    known = {name: found for name, cls in offered.items() if (found := getattr(cls, "suggested", None))}
    pipelines = {name: getattr(cls, "pipeline_class", None) for name, cls in offered.items()}
    name = wanted.backbone or _named_by(wanted.model, known, pipelines)
    name = name or next((each for each, found in known.items() if len(found.size) == 2 + clips), None)
    if name is None:
        raise ConfigError(f"no backbone that is installed says that it makes {'clips' if clips else 'pictures'}")
    suggested = known.get(name) or _unsuggested(host, name, wanted.model, clips)
    if clips and len(suggested.size) == 2:
        others = ", ".join(each for each, found in known.items() if len(found.size) == 3)
        raise ConfigError(f"--backbone {name} makes pictures, and {wanted.folder} has clips; there are: {others}")
    model = wanted.model or suggested.path
    local = Path(model).exists() or not HUB.fullmatch(model)
    return Family(name, str(_whole(Path(model))) if local else model, local, suggested)


def _named_by(model: str | None, known: Mapping[str, Suggested], pipelines: Mapping[str, str | None]) -> str | None:
    """Return the family of a model: of a folder by its index, of a name on the hub if it is a suggested one.

    pipelines  the class that model_index.json names in folders of a family, by the family
    """
    if model is None:
        return None
    named = [name for name, found in known.items() if found.path == model]
    try:
        kind = json.loads((Path(model) / INDEX).read_text(encoding="utf-8"))["_class_name"]
        named += [name for name, pipeline in pipelines.items() if pipeline == kind]
    except (OSError, ValueError, LookupError, TypeError):  # the backbone says what is wrong with a folder
        if not named and not Path(model).exists() and HUB.fullmatch(model):
            raise ConfigError(
                f"--model {model}: there is no such folder here; if it is a name on the hub, say of which family it "
                f"is: --backbone {' | '.join(known)}"
            ) from None
    return named[0] if named else None


def _unsuggested(host: Host, name: str, model: str | None, clips: bool) -> Suggested:
    """Return plain settings for a family that suggests none; the model must be named then."""
    host.get("backbones", name)
    if model is None:
        raise ConfigError(f"--backbone {name} suggests no model; name one: --model PATH_OR_NAME")
    side = chosen.SIDES[0]
    return Suggested(path=model, size=(81, 480, 832) if clips else (side, side), guidance=4.5, steps=40)


def _why_unknown(family: Family, backbone: Any) -> str:
    """Return why the model's files cannot be looked at, "" if they can; CorefitError if they are wrong ones."""
    try:
        backbone.check()
    except ModelError as error:
        if not family.local and isinstance(error.__cause__, (OSError, ValueError)):
            return str(error)
        raise
    return ""


# sizes and memory


def _sizes(found: Survey, made_for: Sequence[int], backbone: Any) -> list[Choice]:
    """Return choices of sizes up to what the model was made for, the largest first; of clips also numbers of frames."""
    batch, steps, rank = chosen.plan(found.count)
    *clip, height, width = made_for
    numbers, fps = chosen.frames(found)
    lengths: list[tuple[int, ...]] = [(n,) for n in numbers if n <= (clip or numbers)[0]] or [()]
    made = list[Choice]()
    for side in chosen.sides(found, max(height, width), backbone):
        for length in lengths:
            size = (*length, side, side)
            aspects = chosen.aspects(found, size, batch, backbone)
            made.append(Choice(size=size, aspects=aspects, fps=fps, batch=batch, steps=steps, rank=rank))
    return made


def _guessed(sizes: Sequence[Choice]) -> Fitted:
    """Return what takes little memory, for a model whose files are not at hand."""
    choice = next((each for each in sizes if each.size[-1] <= UNTRIED), sizes[-1])
    return Fitted(evolve(choice, recompute=True), None)


def _memory(fitted: Fitted, device: Device, unknown: str) -> str:
    """Return what is said about memory."""
    total = in_words(int(device.memory))
    if unknown:
        return (
            "The model's files are not at hand, so this is careful and not computed: "
            f"`corefit check{_option(device)}` says whether it fits, once they can be fetched."
        )
    if fitted.estimate is None or fitted.estimate.activations is None:
        return f"What a step takes of {total} is not known for this model, so this is careful: watch the first steps."
    e, how = fitted.estimate, "with" if fitted.choice.recompute else "without"
    parts = f"{in_words(int(e.weights))} of weights, {in_words(e.activations or 0)} of activations"
    return (
        f"A step takes about {in_words(int(e.total))} of {total} ({device.name}) {how} gradient checkpointing: "
        f"{parts}. {1 - ROOM:.0%} or more is left free. Text encoders and the VAE are not there while it trains."
    )


def _option(device: Device) -> str:
    """Return the option by which `corefit check` is told a GPU that this machine need not have."""
    return f" --gpu {device.memory / (1 << 30):g}GiB" if device.planned else ""


def _said(draft: Draft, choice: Choice, memory: str, unknown: str) -> list[str]:
    """Return the lines that are printed."""
    found, family = draft.found, draft.family
    captioned = found.count - found.bare
    size = " x ".join(map(str, choice.size)) + (f" in {len(choice.aspects)} shapes" if choice.aspects else "")
    lines = [
        f"{counted(found.count, found.noun)}, {captioned} with captions: a LoRA of rank {choice.rank} for "
        f"{family.name} ({Path(family.found).name if family.local else family.found})",
        f"size {size}; {counted(choice.steps, 'step')} of {choice.batch}, so each {found.noun} is seen about "
        f"{choice.seen / found.count:.3g} times",
        *(f"note: {note}" for note in found.notes),
        memory,
    ]
    return [*lines, f"the model could not be looked at: {unknown}"] if unknown else lines


def _relative(path: Path, folder: Path) -> str:
    """Return a path as seen from the folder of the pipeline file; a link is named by its own name."""
    return Path(os.path.relpath(_whole(path), folder.resolve())).as_posix()


def _whole(path: Path) -> Path:
    return path.absolute().parent.resolve() / path.absolute().name
