"""A pipeline. `read` makes one from a TOML file and checks it; `corefit.run` runs its stages.

The same classes serve in Python: Pipeline(name=..., backbone=Sd3(path=...), data=Data(...), stage=[Stage(...)]).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from attrs import define, field, validators

from corefit.data import buckets, cache
from corefit.data.order import check_batch
from corefit.data.settings import Data
from corefit.errors import ConfigError, near
from corefit.pipeline.card import Card
from corefit.pipeline.eval import Eval
from corefit.pipeline.problems import error_of, eval_problems, layout_problems, repeated, reward_problems
from corefit.pipeline.reader import TABLE, Reader, Table, checked_path, load, override
from corefit.plugins.host import Host
from corefit.system import public
from corefit.system.layout import Layout
from corefit.types import Backbone, Observer, Offloading, Quantizable
from corefit.types.objective import further_media, reads_media
from corefit.types.stage import Full, Lora, Optimizer, Stage, Training

__all__ = ["Data", "Eval", "Full", "Lora", "Optimizer", "Pipeline", "Stage", "read"]

T = TypeVar("T")
BASE = "base"
"""The name of the model that the first stage starts from: in `from`, and in the results."""
MODES: Mapping[str, type] = {"full": Full, "lora": Lora}
CHOICES: Mapping[Any, Mapping[str, type]] = {Training: MODES, Training | None: MODES}


@define(kw_only=True, eq=False)
class Pipeline:
    """One run: a backbone, data, stages in order, and how they are evaluated."""

    name: str = field(validator=validators.matches_re(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}"))
    """The run's name; its folder is runs/<name>."""
    backbone: Backbone
    """The model: its family, and the path of its weights."""
    data: Data
    """The data that the stages train on."""
    stage: tuple[Stage, ...] = field(converter=tuple)
    """The stages, in order; each starts from the weights that the one before saved, or those that `from` names."""
    train: Training = field(factory=Full, metadata={TABLE: "backbone"})
    """Which weights are trainable, in stages without a `train` of their own. In TOML it is a key of `[backbone]`."""
    seed: int = 0
    """The seed of all randomness of training: noise, the order of examples, the choice of captions, initial LoRAs.
    Evaluation has a `seed` of its own."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the computation; `auto` is bf16 on a GPU that supports it, otherwise fp32."""
    shard: bool = False
    """Whether weights, gradients and optimizer state are split over the processes (FSDP2), or each has a copy (DDP)."""
    gather: Literal["auto", "step", "term"] = "auto"
    """How long sharded weights stay gathered once they are used: during a whole `step`, in which gradients are then
    exchanged once, or during a `term` of it alone, which takes less memory. `auto` is `step` where memory allows."""
    replicate: int = field(default=1, validator=validators.ge(1))
    """Number of groups of processes that hold all shards each (HSDP): with as many as there are machines, weights are
    gathered within a machine, and only gradients are exchanged between machines."""
    context_parallel: int = field(default=1, validator=validators.ge(1))
    """Number of processes that share each sample: each computes a part of its sequence, as long clips need it."""
    eval: Eval | None = None
    """How the base model and every stage are evaluated; without this table nothing is evaluated."""
    card: Card = field(factory=Card)
    """What the model cards say beside what the run knows; no weights depend on it."""
    observer: tuple[Observer, ...] = ()
    """The observers, each told what happens in the run: trackers, notes at its end. No result depends on them."""
    plugins: tuple[str, ...] = ()
    """Python files with plugins of your own, which are loaded beside the installed plugins."""
    out: Path | None = None
    """The folder that run folders are created in; by default `runs` beside the pipeline file."""

    host: Host = field(init=False, factory=Host)
    folder: Path = field(init=False, factory=Path.cwd)
    """The folder of the pipeline file; its .corefit/ holds the cache of encoded data."""

    @property
    def run_folder(self) -> Path:
        return (self.out or self.folder / "runs") / self.name

    @property
    def needs_media(self) -> bool:
        """Whether any stage trains on media; otherwise all train on prompts alone."""
        return any(reads_media(stage.objective) for stage in self.stage)

    @property
    def further_media(self) -> tuple[str, ...]:
        """The names of the further media that any stage's objective reads, sorted: encoded beside the main ones.

        A backbone that reads a medium as input, to edit it or to begin a clip with it, would add its name here.
        """
        return tuple(sorted({name for stage in self.stage for name in further_media(stage.objective)}))

    @property
    def layout(self) -> Layout:
        """How processes share weights and samples."""
        return Layout(shard=self.shard, gather=self.gather, replicate=self.replicate, context=self.context_parallel)

    def mode(self, stage: Stage) -> Training:
        """Return which weights are trainable in a stage."""
        return stage.train or self.train

    def parent(self, stage: Stage) -> Stage | None:
        """Return the stage whose weights `stage` starts from, None for the base."""
        names = [each.name for each in self.stage]
        number = names.index(stage.name)
        if stage.from_ is not None:
            return None if stage.from_ == BASE else self.stage[names.index(stage.from_)]
        return self.stage[number - 1] if number else None

    def lineage(self, stage: Stage) -> tuple[Stage, ...]:
        """Return the stages whose training is in the weights of `stage`, from the base on; the stage itself is last."""
        parent = self.parent(stage)
        return (*(self.lineage(parent) if parent else ()), stage)

    def freezes_in_half(self, stage: Stage) -> bool:
        """Return whether, under precision bf16, the weights that `stage` does not train are held in bfloat16.

        The weights of the base are. Weights that full training in a stage of its lineage saved in float32 stay in
        float32, because rounding would lose small updates.
        """
        before = self.lineage(stage)[:-1]
        exact = [each.save_dtype == "fp32" for each in before if isinstance(self.mode(each), Full)]
        return isinstance(self.mode(stage), Lora) and not (exact and exact[-1])

    def check(self) -> None:
        """Raise ConfigError with every problem that can be found without loading weights."""
        problems = list(self._problems())
        if problems:
            raise ConfigError("\n".join(problems))

    def tables(self, name_path: Callable[[str], str] = str) -> Table:
        """Return the pipeline as tables, with defaults and absolute paths, or as `name_path` names them."""
        tables = Reader(self.host, self.folder, CHOICES).tables(self, name_path)
        files = [name_path(str(self.folder / file)) for file in self.plugins]
        return {**tables, "plugins": files, "out": name_path(str(self.run_folder.parent))}

    def record(self) -> Table:
        """Return `pipeline.toml` of the run's folder: every default, paths as seen from there, and no secrets.

        Whoever gets the folder learns neither secrets nor where the machine keeps things; read where it lies, it is
        the same pipeline.
        """
        return public.without_secrets(self.tables(lambda path: public.seen_from(self.run_folder, path)))

    def _problems(self) -> Iterator[str]:
        names = [stage.name for stage in self.stage]
        if not names:
            yield "stage: there is none; add [[stage]] with name, steps and objective"
        for name in repeated(names):
            yield f"stage.{name}: two stages have this name; rename one"
        if BASE in names:
            yield "stage.base: the base model's results have this name; rename the stage"
        for stage in self.stage:
            yield from (f"stage.{stage.name}.{problem}" for problem in stage.problems())
        starts = [*self._start_problems(names)]
        yield from starts or self._mode_problems()
        yield from self._offload_problems()
        yield from self._reward_problems()
        yield from self._optimizer_problems()
        found = [*error_of("backbone", self.backbone.check)]
        found = found or [*error_of("backbone", lambda: self.backbone.latent_shape(self.data.size))]
        found = found or [*error_of("data", self._sizes)]
        yield from found or layout_problems(self.layout, self.backbone, self._sizes())
        yield from self._data_problems()
        if self.eval:
            yield from eval_problems("eval", self.eval, self.data.size)
            if self.eval.drift and not self.needs_media:
                yield (
                    "eval.drift: it is measured on media of the data, and no stage trains on media; remove it, or "
                    "train on media, as soar and sft do"
                )
        yield from self._observer_problems()
        for stage in self.stage if not self.eval else ():
            if stage.sample_every is not None:
                yield (
                    f"stage.{stage.name}.sample_every: sample grids are drawn from the prompts of [eval], and there is "
                    'none; add [eval] with prompts = ["...", ...], or remove the key'
                )
        nearest = next(folder for folder in (self.run_folder, *self.run_folder.parents) if folder.exists())
        if not nearest.is_dir():
            yield f"out: {nearest} is a file, and the run's folder would be {self.run_folder}; name another"

    def _sizes(self) -> Sequence[Sequence[int]]:
        """Return the sizes of media that are trained on."""
        return buckets.sizes(self.data.size, self.data.aspects, self.backbone)

    def _start_problems(self, names: Sequence[str]) -> Iterator[str]:
        """Refuse a `from` that names neither the base nor an earlier stage."""
        for number, stage in enumerate(self.stage):
            earlier = [BASE, *names[:number]]
            if stage.from_ in (None, *earlier):
                continue
            problem = f"there is no stage {stage.from_!r}{near(str(stage.from_), earlier)}"
            if stage.from_ in names:
                which = "is this stage" if stage.from_ == stage.name else "comes later in the file"
                problem = f"{stage.from_!r} {which}, and a stage starts from the base or from an earlier one"
            yield f"stage.{stage.name}.from: {problem}; there are: {', '.join(earlier)}"

    def _mode_problems(self) -> Iterator[str]:
        """Refuse stages that would drop or change the LoRA that they start from, or save a LoRA in bf16.

        Full training of weights in fewer bits is refused, too: a step would be smaller than their rounding.
        """
        bits = self.backbone.frozen if isinstance(self.backbone, Quantizable) else None
        for stage in self.stage:
            if bits is not None and isinstance(self.mode(stage), Full):
                yield (
                    f"backbone.frozen: {bits!r} is for weights that do not train, and stage {stage.name} trains them "
                    'all; set train = { use = "lora" }, or remove the key'
                )
        for stage in self.stage:
            if stage.save_dtype != "fp32" and isinstance(self.mode(stage), Lora):
                yield f"stage.{stage.name}.save_dtype: a LoRA is saved in float32; remove the key"
        for before, stage in ((self.parent(stage), stage) for stage in self.stage):
            was, now = before and self.mode(before), self.mode(stage)
            if before and isinstance(was, Lora) and was != now:
                what = "full training would drop" if isinstance(now, Full) else "other settings cannot go on with"
                yield (
                    f"stage.{stage.name}.train: {what} the LoRA of stage {before.name}; train both with the same "
                    'settings, or the earlier one with { use = "full" }'
                )

    def _offload_problems(self) -> Iterator[str]:
        """Refuse weights that wait in main memory where all of them train, or are sharded."""
        if not isinstance(self.backbone, Offloading) or not self.backbone.offloads:
            return
        if self.shard:
            yield "shard: sharded weights cannot wait in main memory; remove the key, or 'offload' from [backbone]"
        for stage in self.stage:
            if isinstance(self.mode(stage), Full):
                yield (
                    f"stage.{stage.name}.train: weights that train cannot wait in main memory; train a LoRA, or remove "
                    "'offload' from [backbone]"
                )

    def _reward_problems(self) -> Iterator[str]:
        """Let each reward look for what it lacks, such as a file or a package."""
        places = {f"stage.{stage.name}.reward": stage.reward for stage in self.stage}
        places |= {f"stage.{stage.name}.held_out": stage.held_out for stage in self.stage}
        reported = {"data.score": self.data.score, "eval.reward": self.eval.reward if self.eval else ()}
        for where, entries in reported.items():
            for entry in entries:
                if entry.normalize != "none":
                    yield f"{where}.{entry.name}.normalize: scores are used as they are here; remove the key"
        yield from reward_problems({**places, **reported})

    def _optimizer_problems(self) -> Iterator[str]:
        """Let each optimizer look for what it lacks, such as a package, and refuse those that cannot be sharded."""
        for stage in self.stage:
            where, optimizer = f"stage.{stage.name}.optimizer", stage.optimizer
            yield from error_of(where, optimizer.check)
            if self.shard and optimizer.shards == "no":
                offers = self.host.offers["optimizers"].items()
                others = ", ".join(sorted(name for name, offer in offers if offer.cls.shards != "no"))
                yield (
                    f"{where}: {self.host.name_of('optimizers', optimizer)} needs whole weights, and 'shard' gives "
                    f"each process a part of them; use one of {others}, or remove 'shard'"
                )

    def _observer_problems(self) -> Iterator[str]:
        """Let each observer look for what it lacks, such as a package."""
        names = [self.host.name_of("observers", each) for each in self.observer]
        for name in repeated(names):
            yield f"observer: {name!r} is listed twice; remove one"
        for name, each in zip(names, self.observer, strict=True):
            yield from error_of(f"observer.{name}", each.check)

    def _data_problems(self) -> Iterator[str]:
        counted: list[int | None] = []
        media, extra = self.needs_media, self.further_media
        yield from error_of("data", lambda: counted.append(cache.check(self.data, media=media, extra=extra)))
        for stage in self.stage if counted and counted[0] else ():
            rows, group = stage.rows, stage.objective.group_size
            if rows % group == 0:
                yield from error_of(
                    f"stage.{stage.name}",
                    lambda rows=rows, group=group: check_batch(counted[0] or 0, rows, group, 1, self.data.order),
                )


def read(path: str | Path, settings: Sequence[str] = (), host: Host | None = None) -> Pipeline:
    """Read a pipeline from a TOML file and check it; `settings` override keys, as `--set` does.

    Raises ConfigError, DataError, ModelError or PluginError; the message says what is wrong, where, and what to do.
    """
    return read_as(Pipeline, Path(path), settings, host)


def read_as(cls: type[T], path: Path, settings: Sequence[str], host: Host | None) -> T:
    """Read a `cls`, which has a host, a folder and a check as a pipeline has, from a TOML file, and check it."""
    found: Any = read_unchecked(cls, path, settings, host)
    found.check()
    return found


def read_unchecked(cls: type[T], path: Path, settings: Sequence[str], host: Host | None = None) -> T:
    """Do what `read_as` does, and check only each key by itself."""
    tables = load(path)
    override(tables, settings)
    folder, host = path.resolve().parent, host or Host()
    for file in plugin_files(tables):
        host.add_file(folder / file)
    found: Any = Reader(host, folder, CHOICES).read(tables, cls)
    found.host, found.folder = host, folder
    return found


def plugin_files(tables: Table) -> Sequence[str]:
    files = tables.get("plugins", [])
    if not isinstance(files, list) or not all(isinstance(f, str) for f in files):
        raise ConfigError(f'plugins: must be a list of files, such as ["my_objective.py"], not {files!r}')
    try:
        return [checked_path(file) for file in files]
    except ConfigError as error:
        raise ConfigError(f"plugins: {error}") from error
