"""The model that a stage of a run has left."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import define, frozen

from corefit.errors import ConfigError, near
from corefit.pipeline.evaluation import weights_of_stage
from corefit.pipeline.pipeline import CHOICES
from corefit.pipeline.reader import Reader
from corefit.plugins.host import Host
from corefit.run.plan import MODEL, RESULTS
from corefit.run.report.results import Row, read_results
from corefit.types import Backbone

READ_BY_TRAINING = ("train", "frozen")
"""Keys of [backbone] that say how it is trained: what is published has its weights as they are in the files."""


@define(kw_only=True, eq=False)
class _Base:
    """What is read of a run's pipeline to load its models: data and rewards may be gone by then."""

    backbone: Backbone


@frozen(eq=False)
class Output:
    """The model of a finished stage.

    tables  the run's pipeline.toml; its paths are relative to `run`
    whole   the folder, in diffusers' layout, of the weights that a LoRA goes on, or of the stage's own; None where
            these are the base's, which `[backbone] path` names
    lora    the folder of the stage's LoRA, None if it trained all weights
    """

    run: Path
    stage: str
    folder: Path
    tables: Mapping[str, Any]
    whole: Path | None
    lora: Path | None

    @staticmethod
    def of(run: Path, stage: str) -> Output:
        """Find the model of a stage. Raises ConfigError if there is no such run or stage, or it has not finished."""
        file = run / "pipeline.toml"
        if not file.is_file():
            raise ConfigError(f"{run} is not the folder of a run; name one such as runs/digits")
        tables = tomllib.loads(file.read_text("utf-8"))
        names = [each["name"] for each in tables["stage"]]
        if stage not in names:
            raise ConfigError(f"{run} has no stage {stage!r}; it has {', '.join(names)}{near(stage, names)}")
        folder = run / f"{names.index(stage) + 1:02d}-{stage}"
        if not (folder / MODEL).is_dir():
            raise ConfigError(f"the stage {stage!r} of {run} has not finished; run its pipeline first")
        return Output(run, stage, folder, tables, *weights_of_stage(folder))

    @property
    def model(self) -> Path:
        """The folder that the stage has saved: a model in diffusers' layout, or a LoRA."""
        return self.folder / MODEL

    def base(self) -> Backbone:
        """Return the backbone of the pipeline, with the base's weights, not loaded; no format of fewer bits is kept."""
        host = Host()
        for plugin in self.tables.get("plugins", []):
            host.add_file(self.run / plugin)
        backbone = {key: value for key, value in self.tables["backbone"].items() if key not in READ_BY_TRAINING}
        return Reader(host, self.run, CHOICES).read({"backbone": backbone}, _Base).backbone

    def backbone(self) -> Backbone:
        """Return the backbone with the weights of `whole`, not loaded; `lora` is not on it yet."""
        return self.base().from_saved(self.whole) if self.whole else self.base()

    def results(self) -> list[Row]:
        """Return the rows of the run's results.json, [] if nothing was evaluated."""
        file = self.run / RESULTS
        return read_results(file) if file.is_file() else []
