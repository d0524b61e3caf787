"""An evaluation: prompts x models x rewards, without training. `read_evaluation` makes one from a TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from attrs import define, field, frozen, validators

from corefit.data.settings import check_size
from corefit.errors import ConfigError
from corefit.pipeline.eval import Eval
from corefit.pipeline.pipeline import BASE, CHOICES, read_as
from corefit.pipeline.problems import error_of, eval_problems, layout_problems, repeated, reward_problems
from corefit.pipeline.reader import Reader, Table
from corefit.plugins.host import Host
from corefit.system import public
from corefit.system.layout import Layout
from corefit.types import Backbone, ModelPath

NAME: Any = validators.matches_re(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
INDEX = "model_index.json"
"""The file that a whole model in diffusers' layout has, and a LoRA has not."""


@frozen(kw_only=True)
class Model:
    """One `[[model]]`: weights that are evaluated."""

    name: str = field(validator=NAME)
    """The name of its row in the results."""
    path: ModelPath | None = None
    """A model in diffusers' layout, such as runs/digits/01-soar/model or a name on the hub; by default the path of
    `[backbone]`."""
    lora: Path | None = None
    """The folder of a LoRA on top of it."""
    stage: Path | None = None
    """The folder of a stage of a run, such as runs/digits/02-grpo, in place of `path` and `lora`. If the stage trained
    a LoRA, it is put on the weights that the stage started from."""

    def __attrs_post_init__(self) -> None:
        if self.stage and (self.path or self.lora):
            raise ValueError("'stage' names all of the weights; remove path and lora, or stage")

    def resolved(self, backbone: Backbone) -> tuple[Backbone, Path | None]:
        """Return the backbone with these weights, not loaded, and the LoRA on top of them.

        Raises ConfigError if a folder is missing, or is not what its key says.
        """
        if self.stage:
            whole, lora = weights_of_stage(self.stage)
            return backbone.from_saved(whole) if whole else backbone, lora
        if self.lora and not self.lora.is_dir():
            raise ConfigError(f"lora: there is no folder {self.lora}")
        if self.lora and (self.lora / INDEX).is_file():
            raise ConfigError(f"lora: {self.lora} is a whole model; name it as `path`")
        return backbone.from_saved(Path(self.path)) if self.path else backbone, self.lora


@frozen(kw_only=True)
class Benchmark(Eval):
    """One `[[benchmark]]`: held-out prompts, and how media that are generated for them are scored."""

    name: str = field(validator=NAME)
    """The benchmark's name; its results are in a folder of that name."""


@define(kw_only=True, eq=False)
class Evaluation:
    """Prompts x models x rewards: a backbone, the models that are compared, and the benchmarks."""

    name: str = field(validator=NAME)
    """The evaluation's name; its folder is evals/<name>."""
    backbone: Backbone
    """The model: its family, and the path of the base weights."""
    size: tuple[int, ...] = field(validator=check_size)
    """Size of the media that are generated: [height, width], or [frames, height, width]."""
    model: tuple[Model, ...] = field(converter=tuple)
    """The models, a row of the results for each. Gains are over the first one."""
    benchmark: tuple[Benchmark, ...] = field(converter=tuple)
    """The benchmarks."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the computation; `auto` is bf16 on a GPU that supports it, otherwise fp32. Under bf16 the networks
    of all models are held in bfloat16."""
    shard: bool = False
    """Whether weights are split over the processes (FSDP2), or each has a copy."""
    gather: Literal["auto", "step", "term"] = "auto"
    """How long sharded weights stay gathered: while media are generated (`step`), or during a forward alone (`term`).
    `auto` is `step` where memory allows."""
    replicate: int = field(default=1, validator=validators.ge(1))
    """Number of groups of processes that hold all shards each (HSDP), such as the number of machines."""
    context_parallel: int = field(default=1, validator=validators.ge(1))
    """Number of processes that share each sample: each computes a part of its sequence."""
    plugins: tuple[str, ...] = ()
    """Python files with plugins of your own, which are loaded beside the installed plugins."""
    out: Path | None = None
    """The folder that folders of evaluations are created in; by default `evals` beside the file."""

    host: Host = field(init=False, factory=Host)
    folder: Path = field(init=False, factory=Path.cwd)

    @property
    def run_folder(self) -> Path:
        """The evaluation's own folder."""
        return (self.out or self.folder / "evals") / self.name

    @property
    def layout(self) -> Layout:
        """How processes share weights and samples."""
        return Layout(shard=self.shard, gather=self.gather, replicate=self.replicate, context=self.context_parallel)

    def check(self) -> None:
        """Raise ConfigError with every problem that can be found without loading weights."""
        problems = list(self._problems())
        if problems:
            raise ConfigError("\n".join(problems))

    def tables(self, name_path: Callable[[str], str] = str) -> Table:
        """Return the evaluation as tables, with defaults and absolute paths, or as `name_path` names them."""
        tables = Reader(self.host, self.folder, CHOICES).tables(self, name_path)
        files = [name_path(str(self.folder / file)) for file in self.plugins]
        return {**tables, "plugins": files, "out": name_path(str(self.run_folder.parent))}

    def record(self) -> Table:
        """Return `evaluation.toml` of the folder: every default, paths as seen from there, and no secrets."""
        return public.without_secrets(self.tables(lambda path: public.seen_from(self.run_folder, path)))

    def _problems(self) -> Iterator[str]:
        for key, entries in (("model", self.model), ("benchmark", self.benchmark)):
            if not entries:
                yield f"{key}: there is none; add [[{key}]] with a name"
            for name in repeated(entry.name for entry in entries):
                yield f"{key}.{name}: two have this name; rename one"
        found = [*error_of("backbone", self.backbone.check)]
        found = found or [*error_of("backbone", lambda: self.backbone.latent_shape(self.size))]
        yield from found or layout_problems(self.layout, self.backbone, [self.size])
        for model in self.model:
            yield from error_of(f"model.{model.name}", lambda model=model: model.resolved(self.backbone)[0].check())
        for benchmark in self.benchmark:
            where = f"benchmark.{benchmark.name}"
            yield from eval_problems(where, benchmark, self.size)
            yield from reward_problems({f"{where}.reward": benchmark.reward})
            if benchmark.drift:
                yield f"{where}.drift: it needs the media of a pipeline's [data]; remove the key"


def read_evaluation(path: str | Path, settings: Sequence[str] = (), host: Host | None = None) -> Evaluation:
    """Read an evaluation from a TOML file and check it; `settings` override keys, as `--set` does.

    Raises ConfigError, DataError, ModelError or PluginError; the message says what is wrong, where, and what to do.
    """
    return read_as(Evaluation, Path(path), settings, host)


def weights_of_stage(folder: Path) -> tuple[Path | None, Path | None]:
    """Return the folder of the whole model that a stage of a run left or put its LoRA on, and the folder of that LoRA.

    The first is None where it is the base, the second where the stage trained all weights.
    """
    file = folder.parent / "pipeline.toml"
    if not (folder / "model").is_dir() or not file.is_file():
        raise ConfigError(f"stage: {folder} is no finished stage of a run; name a folder such as runs/digits/01-soar")
    stages = tomllib.loads(file.read_text("utf-8")).get("stage", [])
    folders = {entry["name"]: folder.parent / f"{n:02d}-{entry['name']}" for n, entry in enumerate(stages, 1)}
    starts = {
        entry["name"]: entry.get("from") or before for before, entry in zip([BASE, *folders], stages, strict=False)
    }
    lora, name = None, next((name for name, each in folders.items() if each.name == folder.name), BASE)
    while name != BASE:
        model = folders[name] / "model"
        if (model / INDEX).is_file():
            return model, lora
        lora, name = lora or model, starts[name]
    return None, lora
