"""Take a pipeline through its stages: encode, judge the base, then train, save and judge stage after stage."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import signal
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from attrs import define, field, frozen

from corefit import cache, identity, memory, report, state, train
from corefit.data import Dataset
from corefit.display import Display
from corefit.errors import ConfigError
from corefit.evaluate import Judge
from corefit.pipeline import Lora, Pipeline, Stage
from corefit.types import Backbone, TrainState

if TYPE_CHECKING:
    from accelerate import Accelerator

DONE = "done.json"
SCORES = "scores.json"
BASE = "base"


def run(pipeline: Pipeline, display: Display | None = None) -> Path:
    """Run what is not finished; the run's folder. Raises CorefitError, and train.Stopped after a signal."""
    accelerator = train.accelerator(pipeline.precision)
    shown = display or Display.on(accelerator.is_main_process)
    with _locked(pipeline.run_folder, accelerator), shown:
        Run(pipeline, accelerator, shown).all()
    return pipeline.run_folder


@frozen
class Weights:
    """Where a stage's start is: a folder of weights, a LoRA on top of it, and the hash of what made them."""

    backbone: Backbone
    adapter: Path | None
    identity: str


@define(eq=False)
class Run:
    """One run in progress."""

    pipeline: Pipeline
    accelerator: Accelerator
    display: Display
    dataset: Dataset = field(init=False)
    judge: Judge | None = field(init=False, default=None)
    scores: list[report.Scores] = field(init=False, factory=list[report.Scores])
    signalled: bool = field(init=False, default=False)

    @property
    def folder(self) -> Path:
        return self.pipeline.run_folder

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    def all(self) -> None:
        """The whole run."""
        if self.main:
            self._write_pipeline()
        self._encode()
        weights = Weights(self.pipeline.backbone, None, identity.of_base(self.pipeline))
        self._judge(BASE, self.folder / "00-base", weights, train.Cost(0, 0, 0))
        for number, stage in enumerate(self.pipeline.stage, 1):
            weights = self._stage(stage, self.folder / f"{number:02d}-{stage.name}", weights)
        if self.main:
            self._report()

    def _write_pipeline(self) -> None:
        import tomli_w

        self.folder.mkdir(parents=True, exist_ok=True)
        text = tomli_w.dumps(_plain(self.pipeline.tables()))
        report.write_whole(self.folder / "pipeline.toml", text.encode())

    def _encode(self) -> None:
        """Latents and conditions of data and prompts: from the cache, or into it now."""
        pipeline, root = self.pipeline, self.pipeline.folder / ".corefit" / "cache"
        pipeline.backbone.place(self.accelerator.device, self._text_dtype())
        self.dataset = self._encoded(pipeline.data, root, pipeline.needs_media, "encoding data")
        if pipeline.eval:
            prompts = self._encoded(pipeline.eval.data(pipeline.data.size), root, False, "encoding prompts")
            self.judge = Judge(pipeline.eval, prompts, pipeline.seed, self.accelerator)
        pipeline.backbone.release()

    def _encoded(self, data: Any, root: Path, media: bool, title: str) -> Dataset:
        with self.accelerator.main_process_first(), self.display.task(title) as progress:
            folder = cache.prepare(data, self.pipeline.backbone, root, media=media, progress=progress)
        return Dataset.open(folder)

    def _text_dtype(self) -> Any:
        """One precision for text in all stages and evaluation, whatever they train."""
        import torch

        return torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32

    def _stage(self, stage: Stage, folder: Path, before: Weights) -> Weights:
        """Train a stage unless it is finished, and judge it; the weights it leaves."""
        precision = str(self.accelerator.mixed_precision)
        mine = identity.of_stage(self.pipeline, stage, before.identity, self.dataset.manifest.key, precision)
        done = _read(folder / DONE)
        if done.get("identity") == mine and done.get("finished", False):
            self.display.say(f"{stage.name}: finished before, used as it is")
            cost = train.Cost(**done["cost"])
        else:
            if self.main:
                self._claim(folder, mine, done)
            self.accelerator.wait_for_everyone()
            cost = self._train(stage, folder, before)
            if self.main:
                _write(folder / DONE, {"identity": mine, "finished": True, "cost": attrs.asdict(cost)})
        after = self._left(stage, folder / "model", before, mine)
        self._judge(stage.name, folder, after, cost)
        return after

    def _left(self, stage: Stage, model: Path, before: Weights, mine: str) -> Weights:
        if isinstance(self.pipeline.mode(stage), Lora):
            return Weights(before.backbone, model, mine)
        moved = before.backbone.moved(model)
        moved.place(self.accelerator.device, self._text_dtype())
        return Weights(moved, None, mine)

    def _claim(self, folder: Path, mine: str, done: dict[str, Any]) -> None:
        """Make the stage's folder this stage's; what another one left there is moved aside, not overwritten."""
        if folder.exists() and done.get("identity") != mine:
            aside = self.folder / "superseded"
            aside.mkdir(exist_ok=True)
            number = len(list(aside.iterdir())) + 1
            folder.rename(aside / f"{folder.name}-{number}")
            self.display.say(
                f"{folder.name}: the pipeline changed; the former one is in superseded/{folder.name}-{number}"
            )
        _write(folder / DONE, {"identity": mine, "finished": False})

    def _train(self, stage: Stage, folder: Path, before: Weights) -> train.Cost:
        """Train and save; a signal writes a checkpoint first."""
        memory.reset_peak(self.accelerator.device)
        hook, backbone = self.pipeline.host.hook, before.backbone
        with self.display.task(stage.name) as progress, self._signals():
            observed = _Observed(self, stage, folder, backbone)
            job = train.Job(
                stage=stage,
                mode=self.pipeline.mode(stage),
                seed=self.pipeline.seed,
                backbone=backbone,
                dataset=self.dataset,
                order=self.pipeline.data.order,
                folder=folder,
                adapter=before.adapter,
                stop=lambda: self.signalled,
                stepped=lambda step, metrics: progress(step, stage.steps, metrics),
                started=lambda step: observed.tell(hook.corefit_stage_started, step),
                logged=lambda step, metrics: observed.tell(hook.corefit_step_finished, step, metrics=metrics),
                saved=lambda step, path: observed.tell(hook.corefit_checkpoint_saved, step, path=path),
            )
            cost = train.train(job, self.accelerator)
        if self.main:
            partial = folder / ".partial-model"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            backbone.save(partial)
            state.publish(partial, folder / "model")
            observed.tell(hook.corefit_stage_finished, stage.steps)
        backbone.transformer = None
        self.accelerator.wait_for_everyone()
        return cost

    @contextlib.contextmanager
    def _signals(self) -> Generator[None]:
        """The first SIGINT or SIGTERM asks for a checkpoint after the step; a second one ends the process now."""

        def note(number: int, frame: object) -> None:
            if self.signalled:
                raise KeyboardInterrupt
            self.signalled = True
            self.display.say("stopping after this step; once more to stop now")

        former = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _judge(self, name: str, folder: Path, weights: Weights, cost: train.Cost) -> None:
        """Held-out scores of weights as they were saved, unless they are known."""
        if self.judge is None:
            return
        wanted = identity.of_scores(self.pipeline, weights.identity, self.judge.prompts.manifest.key)
        kept: dict[str, Any] = _read(folder / SCORES)
        if kept.get("identity") != wanted:
            self._load(weights)
            with self.display.task(f"{name}: {self.judge.count} held-out prompts") as progress:
                kept = {**self.judge.score(weights.backbone, progress), "identity": wanted}
            if self.main:
                _write(folder / SCORES, kept)
                self.judge.keep_samples(weights.backbone, folder / "samples")
        weights.backbone.release()
        weights.backbone.transformer = None
        self.scores.append(
            report.Scores(
                name, kept["values"], kept["categories"], cost.seconds, cost.samples_per_second, cost.peak_memory
            )
        )

    def _load(self, weights: Weights) -> None:
        import torch

        half = self.accelerator.mixed_precision == "bf16"
        weights.backbone.load(self.accelerator.device, torch.bfloat16 if half else torch.float32)
        if weights.adapter:
            weights.backbone.load_lora(weights.adapter)

    def _report(self) -> None:
        """results.json, the table, the comparison and report.html."""
        if self.judge is None:
            return
        rows = report.results(self.scores)
        report.write_results(self.folder / "results.json", rows)
        names = ["00-base", *(f"{n:02d}-{stage.name}" for n, stage in enumerate(self.pipeline.stage, 1))]
        stages = [score.stage for score in self.scores]
        self.judge.compare(stages, [self.folder / name / "samples" for name in names], self.folder / "comparison.png")
        report.page(self.folder)
        report.print_table(self.scores, rows, self.display.console)


@frozen(eq=False)
class _Observed:
    """Calls observers on the main process with the state of a stage."""

    run: Run
    stage: Stage
    folder: Path
    backbone: Backbone

    def tell(self, hook: Any, step: int, **rest: Any) -> None:
        if self.run.main:
            judge = self.run.judge
            sample = (lambda: judge.samples(self.backbone)) if judge else None
            hook(stage=self.stage, state=TrainState(step, self.folder, self.backbone, sample), **rest)


@contextlib.contextmanager
def _locked(folder: Path, accelerator: Accelerator) -> Generator[None]:
    """Two runs must not share a folder; the lock goes with the process, however it ends."""
    if not accelerator.is_main_process:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process is running in {folder}; wait for it, or give this run another name or --out"
            ) from None
        yield


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _write(path: Path, value: dict[str, Any]) -> None:
    report.write_whole(path, json.dumps(value, indent=1).encode())


def _plain(value: Any) -> Any:
    """Tables without the empty lists and Nones that TOML cannot or need not say."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v is not None and v != []}
    return [_plain(v) for v in value] if isinstance(value, list) else value
