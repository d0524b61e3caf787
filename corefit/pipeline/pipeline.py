"""A pipeline: `read` makes one from TOML, checked; corefit.run takes it through its stages.

The same classes serve in Python: Pipeline(name=..., backbone=Sd3(path=...), data=Data(...), stage=[Stage(...)]).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from attrs import define, field, validators

from corefit.data import buckets, cache
from corefit.data.order import check_batch
from corefit.data.settings import Data
from corefit.errors import ConfigError, CorefitError
from corefit.pipeline.eval import Eval
from corefit.pipeline.reader import TABLE, Reader, Table, checked_path, load, override
from corefit.plugins.host import Host
from corefit.types import Backbone
from corefit.types.stage import Full, Lora, Optimizer, Stage, Training

__all__ = ["Data", "Eval", "Full", "Lora", "Optimizer", "Pipeline", "Stage", "read"]

MODES: Mapping[str, type] = {"full": Full, "lora": Lora}
CHOICES: Mapping[Any, Mapping[str, type]] = {Training: MODES, Training | None: MODES}


@define(kw_only=True, eq=False)
class Pipeline:
    """One run: a backbone, data, stages in order, and how they are judged."""

    name: str = field(validator=validators.matches_re(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}"))
    """The run's folder is runs/<name>."""
    backbone: Backbone
    """The model: its family and where it lies."""
    data: Data
    """What stages train on."""
    stage: tuple[Stage, ...] = field(converter=tuple)
    """The stages, in order; each starts from the weights that the one before left."""
    train: Training = field(factory=Full, metadata={TABLE: "backbone"})
    """In TOML a key of [backbone]: which weights train, in stages that do not say so themselves."""
    seed: int = 0
    """Of all randomness: noise, order, captions, the new LoRA."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 on a GPU that has it."""
    shard: bool = False
    """Split weights, gradients and optimizer state over the processes (FSDP2); otherwise each has all (DDP)."""
    eval: Eval | None = None
    """How the base and every stage are judged; nothing is judged without it."""
    plugins: tuple[str, ...] = ()
    """Local plugin files."""
    out: Path | None = None
    """Where run folders go; `runs` beside the pipeline file by default."""

    host: Host = field(init=False, factory=Host)
    folder: Path = field(init=False, factory=Path.cwd)
    """Of the pipeline file; the cache of encoded data is kept in .corefit/ in it."""

    @property
    def run_folder(self) -> Path:
        return (self.out or self.folder / "runs") / self.name

    @property
    def needs_media(self) -> bool:
        """Whether a stage trains on media, or all of them on prompts alone."""
        return any("media" in stage.objective.uses for stage in self.stage)

    def mode(self, stage: Stage) -> Training:
        """Which weights a stage trains."""
        return stage.train or self.train

    def freezes_in_half(self, stage: Stage) -> bool:
        """Whether, under precision bf16, the weights that `stage` does not train are held in bfloat16.

        Those of the base are. What full training before it has left in float32 stays so: rounded, small updates
        would be lost.
        """
        before = self.stage[: [each.name for each in self.stage].index(stage.name)]
        exact = [each.save_dtype == "fp32" for each in before if isinstance(self.mode(each), Full)]
        return isinstance(self.mode(stage), Lora) and not (exact and exact[-1])

    def check(self) -> None:
        """ConfigError with all that can be found wrong without loading weights."""
        problems = list(self._problems())
        if problems:
            raise ConfigError("\n".join(problems))

    def tables(self) -> Table:
        """Everything resolved, as `pipeline.toml` says it; read from any folder, it is the same run."""
        tables = Reader(self.host, self.folder, CHOICES).tables(self)
        files = [str(self.folder / file) for file in self.plugins]
        return {**tables, "plugins": files, "out": str(self.run_folder.parent)}

    def _problems(self) -> Iterator[str]:
        names = [stage.name for stage in self.stage]
        if not names:
            yield "stage: there is none; add [[stage]] with name, steps and objective"
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield f"stage.{name}: two stages have this name; rename one"
        if "base" in names:
            yield "stage.base: the base model's results have this name; rename the stage"
        for stage in self.stage:
            yield from (f"stage.{stage.name}.{problem}" for problem in stage.problems())
        yield from self._mode_problems()
        found = [*_told("backbone", self.backbone.check)]
        found = found or [*_told("backbone", lambda: self.backbone.latent_shape(self.data.size))]
        yield from found or _told("data", lambda: buckets.sizes(self.data.size, self.data.aspects, self.backbone))
        yield from self._data_problems()
        if self.eval:
            yield from self._eval_problems(self.eval)
        there = next(folder for folder in (self.run_folder, *self.run_folder.parents) if folder.exists())
        if not there.is_dir():
            yield f"out: {there} is a file, and the run's folder would be {self.run_folder}; name another"

    def _mode_problems(self) -> Iterator[str]:
        """A LoRA that a stage leaves goes on in the next one, and is always saved as it is."""
        for stage in self.stage:
            if stage.save_dtype != "fp32" and isinstance(self.mode(stage), Lora):
                yield f"stage.{stage.name}.save_dtype: a LoRA is saved in float32; remove the key"
        for before, stage in pairwise(self.stage):
            was, now = self.mode(before), self.mode(stage)
            if isinstance(was, Lora) and was != now:
                what = "full training would drop" if isinstance(now, Full) else "other settings cannot go on with"
                yield (
                    f"stage.{stage.name}.train: {what} the LoRA of stage {before.name}; train both with the same "
                    'settings, or the earlier one with { use = "full" }'
                )

    def _data_problems(self) -> Iterator[str]:
        counted: list[int | None] = []
        yield from _told("data", lambda: counted.append(cache.check(self.data, media=self.needs_media)))
        for stage in self.stage if counted and counted[0] else ():
            rows, group = stage.rows, stage.objective.group_size
            if rows % group == 0:
                yield from _told(
                    f"stage.{stage.name}",
                    lambda rows=rows, group=group: check_batch(counted[0] or 0, rows, group, 1, self.data.order),
                )

    def _eval_problems(self, eval: Eval) -> Iterator[str]:
        yield from _told("eval.prompts", lambda: cache.check(eval.data(self.data.size), media=False))
        names = [entry.name for entry in eval.reward]
        if not names:
            yield "eval.reward: name at least one reward, or remove [eval]"
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield f"eval.reward: {name!r} is listed twice; remove one"


def read(path: str | Path, settings: Sequence[str] = (), host: Host | None = None) -> Pipeline:
    """The checked pipeline of a TOML file; `settings` override keys, as `--set` does.

    Raises ConfigError, DataError, ModelError or PluginError: what is wrong, where, and what to do.
    """
    path = Path(path)
    tables = load(path)
    override(tables, settings)
    folder, host = path.resolve().parent, host or Host()
    for file in _plugin_files(tables):
        host.add_file(folder / file)
    pipeline = Reader(host, folder, CHOICES).read(tables, Pipeline)
    pipeline.host, pipeline.folder = host, folder
    pipeline.check()
    return pipeline


def _plugin_files(tables: Table) -> Sequence[str]:
    files = tables.get("plugins", [])
    if not isinstance(files, list) or not all(isinstance(f, str) for f in files):
        raise ConfigError(f'plugins: must be a list of files, such as ["my_objective.py"], not {files!r}')
    try:
        return [checked_path(file) for file in files]
    except ConfigError as error:
        raise ConfigError(f"plugins: {error}") from error


def _told(where: str, attempt: Any) -> Iterator[str]:
    """The message of what `attempt` finds wrong, with its place."""
    try:
        attempt()
    except CorefitError as error:
        yield f"{where}: {error}"
