"""What `corefit sample MODEL` means: whose weights, beside which base, and the settings of their pipeline."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from attrs import asdict, define, evolve, field, frozen

from corefit.data.settings import check_size
from corefit.data.sources import prompt_source
from corefit.errors import ConfigError, DataError
from corefit.pipeline.eval import Eval
from corefit.pipeline.evaluation import INDEX
from corefit.pipeline.pipeline import BASE, CHOICES, plugin_files
from corefit.pipeline.reader import Reader, Table, load
from corefit.plugins.host import Host
from corefit.run.plan import MODEL
from corefit.run.publish.output import Output
from corefit.types import Backbone, Preset

PIPELINE = "pipeline.toml"
STAGE = re.compile(r"\d\d-(.+)")
"""The name of a stage's folder."""
HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""A model's name on the hub."""
KINDS = "a stage such as runs/digits/02-grpo, a folder in diffusers' layout, or a LoRA"
OF_EVAL = ("guidance", "steps", "seed", "batch")
"""Keys of [eval] that say how a sample is generated."""


@frozen
class Request:
    """What the command line asks for. A setting that is None is the pipeline's."""

    model: str
    """A stage, a folder, a LoRA, or a name on the hub."""
    prompts: Path | tuple[str, ...]
    """The prompts, or a file of them."""
    pipeline: Path | None = None
    backbone: str | None = None
    on: str | None = None
    """What a LoRA goes on."""
    size: tuple[int, ...] | None = None
    settings: Mapping[str, Any] = field(factory=dict[str, Any])
    """Keys of [eval] in place of the pipeline's."""


@frozen(eq=False)
class Subject:
    """Weights that pictures are made with.

    name      what captions and files call them, such as "digits/02-grpo"
    backbone  the backbone with the weights that `lora` goes on, not loaded
    half      whether, under bf16, the weights are held in bfloat16, as they were in training
    """

    name: str
    backbone: Backbone
    lora: Path | None = None
    half: bool = True


@define(kw_only=True, eq=False)
class _Model:
    """The part of a pipeline that its backbone is read from."""

    backbone: Backbone


@define(kw_only=True, eq=False)
class Settings(_Model):
    """The part of a pipeline that samples depend on; data and rewards, which may be gone, are not read."""

    size: tuple[int, ...] = field(validator=check_size)
    eval: Eval
    precision: Literal["auto", "fp32", "bf16"] = "auto"


@frozen(eq=False)
class Sampled:
    """The weights, the base that they are compared with, if there is one, and how samples are generated."""

    subject: Subject
    base: Subject | None
    settings: Settings
    kind: str
    """The name of the backbone."""
    held_out: Sequence[str] | None = ()
    """The prompts of the pipeline's [eval]; None where their file is gone."""
    trigger: str = ""
    """The trigger word of the pipeline's data."""

    def alone(self) -> Sampled:
        """Return the same without the base."""
        return evolve(self, base=None)


def find(request: Request) -> Sampled:
    """Find what a request is about. Raises ConfigError, ModelError or DataError, and says what to name instead."""
    path = Path(request.model)
    stage = _stage_of(path)
    if stage:
        if request.pipeline or request.backbone or request.on:
            raise ConfigError(
                f"{path} is a stage, and its run says the rest; leave out --pipeline, --backbone and --on"
            )
        return _of_stage(request, *stage)
    if (path / PIPELINE).is_file():
        names = ", ".join(sorted(each.parent.name for each in path.glob(f"*/{MODEL}"))) or "none has finished"
        raise ConfigError(f"{path} is a run; name one of its stages, such as {path / '01-...'}: {names}")
    if not path.exists() and not ((request.pipeline or request.backbone) and HUB.fullmatch(request.model)):
        raise ConfigError(f"there is no {path}; name {KINDS}, or a model of the hub together with --backbone")
    return _of_files(request, path)


def _stage_of(path: Path) -> tuple[Path, str] | None:
    """Return the run and the name of the stage that a folder, the model/ in it, or a LoRA's file in that belongs to."""
    folder = path.resolve()
    folder = folder.parent if folder.suffix == ".safetensors" else folder
    folder = folder.parent if folder.name == MODEL else folder
    named = STAGE.fullmatch(folder.name)
    return (folder.parent, named[1]) if named and (folder.parent / PIPELINE).is_file() else None


def _of_stage(request: Request, run: Path, name: str) -> Sampled:
    tables = load(run / PIPELINE)
    settings, kind = _settings(tables, run, request)
    first = tables["stage"][0]
    lora_first = first.get("train", tables["backbone"].get("train", {})).get("use") == "lora"
    base = Subject(f"{run.name}/00-{BASE}", settings.backbone, half=lora_first)
    subject = base
    if name != BASE:
        output = Output.of(run, name)
        backbone = settings.backbone.from_saved(output.whole) if output.whole else settings.backbone
        subject = Subject(f"{run.name}/{output.folder.name}", backbone, output.lora, _is_half(output))
    held_out, trigger = _held_out(tables, run), tables.get("data", {}).get("trigger") or ""
    return Sampled(subject, None if subject is base else base, settings, kind, held_out, trigger)


def _is_half(output: Output) -> bool:
    """Return what Pipeline.freezes_in_half says of the stage, and of full training False: it trains in float32."""
    if output.lora is None or output.whole is None:
        return output.lora is not None
    below = output.whole.parent.name
    stages = {f"{n:02d}-{each['name']}": each for n, each in enumerate(output.tables["stage"], 1)}
    return stages[below].get("save_dtype", "fp32") != "fp32"


def _of_files(request: Request, path: Path) -> Sampled:
    """Find a folder in diffusers' layout, a LoRA, or a model of the hub."""
    is_lora = path.suffix == ".safetensors" or (path.is_dir() and not (path / INDEX).is_file())
    if path.is_file() and not is_lora:
        raise ConfigError(f"{path} is a file, and no LoRA (.safetensors); name {KINDS}")
    if is_lora and path.is_dir() and not any(path.glob("*.safetensors")):
        raise ConfigError(f"{path} has neither a {INDEX} nor a LoRA (.safetensors); name {KINDS}")
    if request.on and not is_lora:
        raise ConfigError(f"--on says what a LoRA goes on, and {path} is a whole model; leave it out")
    folder, tables = Path.cwd(), dict[str, Any]()
    if request.pipeline:
        if request.backbone:
            raise ConfigError("--backbone: the pipeline of --pipeline has one; leave it out")
        folder, tables = request.pipeline.resolve().parent, load(request.pipeline)
    elif is_lora and not request.on:
        raise ConfigError(f"{path} is a LoRA; name what it goes on with --pipeline FILE or --on MODEL")
    below = request.on or ("" if is_lora else request.model)
    if not request.pipeline:
        tables = {"backbone": {"use": request.backbone or _family(Path(below)), "path": _address(below)}}
    settings, kind = _settings(tables, folder, request)
    base = Subject(_name(str(getattr(settings.backbone, "path", BASE))), settings.backbone)
    backbone = settings.backbone.from_saved(Path(_address(below))) if request.pipeline and below else settings.backbone
    subject = Subject(_name(request.model), backbone, path if is_lora else None)
    held_out, trigger = _held_out(tables, folder), tables.get("data", {}).get("trigger") or ""
    return Sampled(subject, base if is_lora or request.pipeline else None, settings, kind, held_out, trigger)


def _address(model: str) -> str:
    """Return a folder's absolute path, or a name on the hub as it is."""
    return str(Path(model).absolute()) if Path(model).exists() else model


def _name(model: str) -> str:
    """Return what to call a model in files that others may read: without the folders above it."""
    path = Path(model).absolute() if Path(model).exists() else Path(model)
    parts = path.parts[-2:] if not path.exists() or path.stem == MODEL else path.parts[-1:]
    return "/".join(parts).removesuffix(".safetensors")


def _family(folder: Path) -> str:
    """Return the name of the backbone whose class the folder's model_index.json names."""
    try:
        named = json.loads((folder / INDEX).read_text("utf-8"))["_class_name"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{folder}: its {INDEX} does not say which family it is ({type(error).__name__}); add --backbone NAME"
        ) from None
    offered = {name: getattr(offer.cls, "pipeline_class", "") for name, offer in Host().offers["backbones"].items()}
    found = [name for name, each in offered.items() if each == named]
    if not found:
        known = ", ".join(f"{name} ({each})" if each else name for name, each in sorted(offered.items()))
        raise ConfigError(
            f"{folder} is a {named}, and the backbones here are: {known}; install "
            "the plugin that offers it, or name one with --backbone"
        )
    return found[0]


def _settings(tables: Table, folder: Path, request: Request) -> tuple[Settings, str]:
    """Read the settings of a pipeline's tables with those of the request in their places, and the backbone's name."""
    host = Host()
    for file in plugin_files(tables):
        if (folder / file).is_file():  # one that is gone may have been for rewards; a backbone would be missed by name
            host.add_file(folder / file)
    table = tables.get("backbone")
    if not isinstance(table, dict):
        raise ConfigError("backbone is missing; the pipeline needs it")
    model = {"backbone": {key: value for key, value in table.items() if key != "train"}}
    backbone = Reader(host, folder, CHOICES).read(model, _Model).backbone
    usual = asdict(backbone.usual()) if isinstance(backbone, Preset) and "data" not in tables else {}
    size = request.size or tables.get("data", {}).get("size") or usual.get("size")
    if not size:
        raise ConfigError(
            "the size is not known; add --size HEIGHT,WIDTH (FRAMES,HEIGHT,WIDTH for clips), or --pipeline FILE"
        )
    before = {**usual, **tables.get("eval", {}), **request.settings}
    prompts = request.prompts
    eval = {key: before[key] for key in OF_EVAL if key in before}
    eval["prompts"] = str(prompts.absolute()) if isinstance(prompts, Path) else list(prompts)
    precision = {"precision": tables["precision"]} if "precision" in tables else {}
    read = Reader(host, folder, CHOICES).read({**model, "size": list(size), "eval": eval, **precision}, Settings)
    return read, host.name_of("backbones", backbone)


def _held_out(tables: Table, folder: Path) -> Sequence[str] | None:
    """Return the prompts of the pipeline's [eval], which is () without [eval]; None where their file is gone."""
    prompts = tables.get("eval", {}).get("prompts", ())
    if not isinstance(prompts, str):
        return tuple(prompts)
    try:
        return [each.prompts[0] for each in prompt_source(folder / prompts).examples()]
    except DataError:
        return None
