"""Take a pipeline through its stages: encode, judge the base, then train, save and judge stage after stage."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import attrs
from attrs import define, field, frozen

from corefit.data.dataset import Dataset
from corefit.errors import ConfigError
from corefit.pipeline.pipeline import Lora, Pipeline, Stage
from corefit.run import agreement, plan, report
from corefit.run.evaluate import KEPT, Evaluator
from corefit.run.plan import MODEL, SCORES, Again, Target
from corefit.run.prepare import encoded, precision, survey, text_dtype
from corefit.system import files, memory
from corefit.system.display import Advance, Display
from corefit.system.ranks import Ranks, join
from corefit.system.signals import ECHO, Signals
from corefit.train import estimate, loop, weights
from corefit.train.job import Cost, Job, Listener, Metrics
from corefit.types import Backbone, Samples, TrainState, blame

T = TypeVar("T")


def run(pipeline: Pipeline, display: Display | None = None, *, again: str = "") -> Path:
    """Run what is not finished; the run's folder. Raises CorefitError, and Stopped after a signal.

    again  a stage that is run anew with those after it, also where they are finished
    """
    ranks = join(pipeline.precision, shard=pipeline.shard)
    ranks.all_or_none(lambda: plan.check_stage(pipeline, again))
    shown = display or Display.on(ranks.main)
    signals = Signals(shown.print, ECHO if ranks.world > 1 else 0.0)
    folder = pipeline.run_folder
    with signals.handled():
        agreement.check(ranks, pipeline, f"run --from {again}" if again else "run")
        with (
            _locked(folder, ranks),
            shown,
            ranks.share_failures(folder),
            blame.no_exit(),
            files.explain_write_errors(folder),
        ):
            Run(pipeline, ranks, shown, signals, Again.of(pipeline, again)).all()
    return pipeline.run_folder


def dry_run(pipeline: Pipeline, display: Display | None = None, *, again: str = "") -> None:
    """Say what `run` would do and why, a line each; nothing is written, no weights are loaded."""
    plan.check_stage(pipeline, again)
    ranks = join(pipeline.precision, shard=pipeline.shard)
    shown = display or Display.on(ranks.main)
    lines = list(_foreseen(pipeline, ranks, Again.of(pipeline, again)))
    width = max(len(name) for name, _ in lines)
    for name, what in lines:
        shown.print(f"{name:{width}}  {what}")


@frozen
class Weights:
    """Where a stage's start is: a folder of weights, and a LoRA on top of it."""

    backbone: Backbone
    adapter: Path | None
    half: bool
    """Whether those of the folder are held in bfloat16, in training and so when they are judged."""


@define(eq=False)
class Run:
    """One run in progress."""

    pipeline: Pipeline
    ranks: Ranks
    display: Display
    signals: Signals
    again: Again
    dataset: Dataset = field(init=False)
    judge: Evaluator | None = field(init=False, default=None)
    scores: list[report.Scores] = field(init=False, factory=list[report.Scores])

    @property
    def folder(self) -> Path:
        return self.pipeline.run_folder

    @property
    def main(self) -> bool:
        return self.ranks.main

    def all(self) -> None:
        """The whole run."""
        if self.main:
            self._write_pipeline()
        self._refuse_too_large()
        self._encode()
        prompts = self.judge and self.judge.prompts.manifest.key
        base, *targets = plan.targets(self.pipeline, self.dataset.key, prompts, precision(self.ranks))
        agreement.refuse_unlike(self.ranks, {"weights of the base": base.weights.hash[:12]})
        start = Weights(self.pipeline.backbone, None, self._half(self.pipeline.stage[0]))
        self._judge(base, start, Cost(0, 0, 0))
        if self.main:
            self.again.keep()
        for stage, target in zip(self.pipeline.stage, targets, strict=True):
            start = self._stage(stage, target, start)
        if self.main:
            self._report([base, *targets])
            self.again.end()

    def _refuse_too_large(self) -> None:
        device, world = estimate.Device.here(), self.ranks.world
        found = estimate.estimates(self.pipeline, device, world, graphs=False)
        estimate.refuse(self.pipeline, found, device, world)

    def _write_pipeline(self) -> None:
        import tomli_w

        self.folder.mkdir(parents=True, exist_ok=True)
        text = tomli_w.dumps(_plain(self.pipeline.tables()))
        files.write_whole(self.folder / "pipeline.toml", text.encode())

    def _encode(self) -> None:
        """Latents and conditions of data and prompts: from the cache, or into it now."""
        self.dataset, prompts = encoded(self.pipeline, self.ranks, self.display)
        if prompts and self.pipeline.eval:
            self.judge = Evaluator(self.pipeline.eval, prompts, self.pipeline.seed, self.ranks)

    def _stage(self, stage: Stage, target: Target, before: Weights) -> Weights:
        """Train a stage unless it is finished, and judge it; the weights it leaves."""
        choice = self.ranks.from_main(lambda: plan.training(target, self.again))
        if choice.use:
            self.display.print(f"{stage.name}: finished before, used as it is")
            self._mend(target, choice)
            cost = Cost(**choice.kept["cost"])
        else:
            if self.main:
                self._claim(target, choice)
            self.ranks.barrier()
            cost = self._train(stage, target, before)
            if self.main:
                files = plan.hashes(target.folder / MODEL)
                plan.note(target, {"finished": True, "cost": attrs.asdict(cost), "model": files})
        after = self._left(stage, target.folder / MODEL, before)
        self._judge(target, after, cost)
        return after

    def _half(self, stage: Stage) -> bool:
        """Whether a stage holds the weights that it does not train in bfloat16."""
        return precision(self.ranks) == "bf16" and self.pipeline.freezes_in_half(stage)

    def _left(self, stage: Stage, model: Path, before: Weights) -> Weights:
        if isinstance(self.pipeline.mode(stage), Lora):
            return Weights(before.backbone, model, self._half(stage))
        moved = before.backbone.from_saved(model)
        moved.place(self.ranks.device, text_dtype(self.ranks))
        return Weights(moved, None, half=False)

    def _claim(self, target: Target, choice: plan.Choice) -> None:
        """Make the stage's folder this stage's; what another one left there is moved aside, not overwritten.

        A kill between any two of these leaves a folder that is not there, or this one's: both are gone on with.
        """
        name = target.folder.name
        if choice.aside:
            former = plan.put_aside(target.folder)
            self.display.print(f"{name}: {choice.why}; the former one is in {former.parent.name}/{former.name}")
        elif choice.kept or choice.harm:
            self.display.print(f"{name}: {choice.harm or choice.why}; it is trained again from its newest checkpoint")
        if choice.going:
            self.display.print(f"{name}: goes on {choice.going}")
        self.again.moved(name)
        plan.note(target, {"finished": False})

    def _mend(self, target: Target, choice: plan.Choice) -> None:
        """Write a done.json that is damaged or missing again, from its copy."""
        if self.main and choice.harm:
            self.display.print(f"{target.folder.name}: {choice.harm}; its copy is not, and it is written again")
            plan.note(target, choice.kept)

    def _train(self, stage: Stage, target: Target, before: Weights) -> Cost:
        """Train and save; a signal writes a checkpoint first."""
        folder = target.folder
        memory.reset_peak(self.ranks.device)
        backbone = before.backbone
        with self.display.task(stage.name) as progress, self.signals.training():
            heard = _Observers(self, stage, folder, backbone, progress)
            job = Job(
                stage=stage,
                mode=self.pipeline.mode(stage),
                seed=self.pipeline.seed,
                backbone=backbone,
                dataset=self.dataset,
                order=self.pipeline.data.order,
                folder=folder,
                identity=target.weights.hash,
                adapter=before.adapter,
                frozen_in_bf16=self._half(stage),
                listener=heard,
            )
            cost = loop.train(job, self.ranks)
            survived = self._save(stage, folder, backbone)
        if self.main:
            heard.call(self.pipeline.host.hook.corefit_stage_finished, stage.steps)
        backbone.transformer = None
        self.ranks.barrier()
        return attrs.evolve(cost, survived=survived)

    def _save(self, stage: Stage, folder: Path, backbone: Backbone) -> float | None:
        """Write the weights that a stage leaves, whole or not at all; what share of its update they still hold."""
        partial = folder / ".partial-model"
        if self.main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        half = stage.save_dtype == "bf16"
        survived = weights.save(backbone, partial, self.ranks, self.pipeline.mode(stage), in_bf16=half)
        if self.main:
            files.publish(partial, folder / MODEL)
        return survived

    def _judge(self, target: Target, made: Weights, cost: Cost) -> None:
        """Held-out scores of weights as they were saved, unless they are known."""
        if self.judge is None:
            return
        choice = self.ranks.from_main(lambda: plan.judging(target))
        if choice.harm:
            self.display.print(f"{target.folder.name}: {choice.harm}; it is judged again")
        kept = choice.kept if choice.use else self._judged(self.judge, target, made)
        made.backbone.release()
        made.backbone.transformer = None
        self.scores.append(report.Scores(target.name, kept["values"], kept["categories"], **attrs.asdict(cost)))

    def _judged(self, judge: Evaluator, target: Target, made: Weights) -> dict[str, Any]:
        backbone, prepare = made.backbone, self.ranks.accelerator.prepare_model
        weights.load(backbone, self.ranks, frozen_in_bf16=made.half, adapter=made.adapter)
        backbone.transformer = prepare(backbone.transformer, evaluation_mode=True)  # computes as training did
        with self.display.task(f"{target.name}: {judge.count} held-out prompts") as progress:
            scored = judge.score(backbone, progress)
        samples = judge.samples(backbone) if self.main or weights.is_sharded(backbone.transformer) else None
        self.ranks.accelerator.free_memory()
        if self.main and samples:
            assert target.scores is not None
            (target.folder / SCORES).unlink(missing_ok=True)  # they are not of the samples that come now
            judge.keep_samples(samples, target.folder / "samples")
            kept = {**scored, "samples": files.sha256(target.folder / "samples" / KEPT)}
            whose = {"parts": target.scores.parts, "rounding": target.scores.rounding}
            files.write_json(target.folder / SCORES, {**kept, "identity": target.scores.hash, **whose})
        return scored

    def _report(self, targets: Sequence[Target]) -> None:
        """results.json, the table, the comparison and report.html."""
        if self.judge is None:
            return
        rows = report.results(self.scores)
        report.write_results(self.folder / "results.json", rows)
        names, samples = [t.name for t in targets], [t.folder / "samples" for t in targets]
        self.judge.compare(names, samples, self.folder / "comparison.png")
        report.page(self.folder)
        report.print_table(self.scores, rows, self.display.console)


@frozen(eq=False)
class _Observers(Listener):
    """Hands on what training tells of itself: to the progress bar, and on the main process to observers."""

    run: Run
    stage: Stage
    folder: Path
    backbone: Backbone
    progress: Advance

    def stop_requested(self) -> bool:
        return self.run.signals.stop_requested

    def stepped(self, step: int, metrics: Metrics) -> None:
        self.progress(step, self.stage.steps, metrics)

    def started(self, step: int) -> None:
        self.call(self.run.pipeline.host.hook.corefit_stage_started, step)

    def saved(self, step: int, path: Path) -> None:
        self.call(self.run.pipeline.host.hook.corefit_checkpoint_saved, step, path=path)

    def logged(self, step: int, metrics: Metrics) -> None:
        """Sharded weights make samples only with all ranks, so they do, where samples are due, before anyone asks."""
        judge, sample = self.run.judge, self._samples()
        if judge and not sample and self.stage.samples(step):
            sample = _kept(judge.samples(self.backbone))
        if self.run.main:
            host, state = self.run.pipeline.host, TrainState(step, self.folder, self.backbone, sample)
            metrics = host.step_metrics(self.stage, state, metrics)
            host.hook.corefit_step_finished(stage=self.stage, state=state, metrics=metrics)

    def call(self, hook: Any, step: int, **rest: Any) -> None:
        """Call a hook of the observers, on the main process."""
        if self.run.main:
            hook(stage=self.stage, state=TrainState(step, self.folder, self.backbone, self._samples()), **rest)

    def _samples(self) -> Samples | None:
        judge = self.run.judge
        if judge is None or weights.is_sharded(self.backbone.transformer):
            return None
        return lambda: judge.samples(self.backbone)


def _kept(made: Any) -> Samples:
    return lambda: made


def _foreseen(pipeline: Pipeline, ranks: Ranks, again: Again) -> Iterator[tuple[str, str]]:
    """(what, what would happen and why), in order."""
    eval, prompts, judged = pipeline.eval, None, 0
    pipeline.backbone.place(ranks.device, text_dtype(ranks))
    dataset, _, said = survey(pipeline, pipeline.data, media=pipeline.needs_media)
    yield "data", said
    if eval:
        prompts, count, said = survey(pipeline, eval.data(pipeline.data.size), media=False)
        yield "prompts", said
        judged = min(count, eval.limit or count)
    targets = plan.targets(pipeline, dataset, prompts, precision(ranks))
    yield from plan.listing(pipeline, targets, again, judged)


@contextlib.contextmanager
def _locked(folder: Path, ranks: Ranks) -> Generator[None]:
    """Two runs must not share a folder; the lock goes with the process, however it ends."""
    with contextlib.ExitStack() as held:

        def lock() -> bool:
            if not ranks.main:
                return True
            try:
                with files.explain_write_errors(folder):
                    folder.mkdir(parents=True, exist_ok=True)
            except FileNotFoundError as error:  # of a file system such as /proc
                raise ConfigError(
                    f"{folder} cannot be made ({error.strerror}); name another place with --out"
                ) from error
            return held.enter_context(files.locked(folder / ".lock", wait=False))

        if not ranks.broadcast_object(ranks.all_or_none(lock)):
            raise ConfigError(
                f"another process is running in {folder}; wait for it, or give this run another name or --out"
            )
        yield


def _plain(value: Any) -> Any:
    """Tables without the empty lists and Nones that TOML cannot or need not say."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v is not None and v != []}
    return [_plain(v) for v in value] if isinstance(value, list) else value
