"""Runs a pipeline: encode the data, evaluate the base, then train, save and evaluate one stage after the other."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import attrs
from attrs import define, field

from corefit.data.dataset import Dataset
from corefit.data.duplicates import duplicates
from corefit.errors import counted
from corefit.pipeline.pipeline import Lora, Pipeline, Stage
from corefit.run import agreement, plan, report
from corefit.run.evaluation import drift, scoring
from corefit.run.evaluation.evaluator import LAST, Evaluator, Media
from corefit.run.evaluation.partial import PARTIAL
from corefit.run.evaluation.scoring import Weights
from corefit.run.events import Events, StageEvents
from corefit.run.folder import locked, refuse_homes, write_toml
from corefit.run.plan import DRIFT, MODEL, RESULTS, Rerun, Target
from corefit.run.prepare import encode, precision, preview, text_dtype
from corefit.run.publish import card, metadata
from corefit.run.record import versions
from corefit.system import files, memory
from corefit.system.display import Display
from corefit.system.homes import Homes
from corefit.system.ranks import Ranks, join
from corefit.system.signals import Signals, echo
from corefit.train import checkpoint, estimate, loop, weights
from corefit.train.job import Cost, Job
from corefit.types import Backbone, Scored, blame

T = TypeVar("T")


def run(pipeline: Pipeline, display: Display | None = None, *, again: str = "", only: Sequence[str] = ()) -> Path:
    """Run the stages that are not finished, and return the run's folder. Raises CorefitError; Stopped after a signal.

    again  the STAGE of `--from`: it and the stages that descend from it are run anew, even if they are finished
    only   the STAGEs of `--only`: the stages that are not finished are run only if they are among these, or if one of
           these descends from them
    """
    ranks = join(pipeline.precision, pipeline.layout)
    ranks.all_or_none(lambda: plan.check_stages(pipeline, again, only))
    display = display or Display.on(ranks.main)
    signals = Signals(display.print, echo(ranks.world))
    folder, events = pipeline.run_folder, Events(pipeline, ranks, display)
    with signals.handled():
        agreement.check(ranks, pipeline, " ".join(["run", *_options(again, only)]))
        with locked(folder, ranks), display, files.explain_write_errors(folder):
            homes = Homes.find(folder, ranks)
            refuse_homes(homes, folder)
            notes = ranks.share_failures(folder, keeper=homes.local.main)
            with events.ending(), notes, blame.no_exit(), files.explain_write_errors(folder):
                rerun = Rerun.load(pipeline, again)
                Run(pipeline, ranks, homes, display, signals, events, rerun, plan.chosen(pipeline, only)).execute()
            # last of all: after a kill before it, the same command goes on and does not begin again; what --only left
            # out of an interrupted --from is still to be run
            if ranks.main and not rerun.pending:
                rerun.finish()
    return pipeline.run_folder


def _options(again: str, only: Sequence[str]) -> list[str]:
    return [*([f"--from {again}"] if again else []), *(f"--only {stage}" for stage in only)]


def dry_run(pipeline: Pipeline, display: Display | None = None, *, again: str = "", only: Sequence[str] = ()) -> None:
    """Print what `run` would do and why, a line for each step; nothing is written, no weights are loaded."""
    plan.check_stages(pipeline, again, only)
    ranks = join(pipeline.precision, pipeline.layout)
    display = display or Display.on(ranks.main)
    lines = list(_dry_run_lines(pipeline, ranks, Rerun.load(pipeline, again), plan.chosen(pipeline, only)))
    width = max(len(name) for name, _ in lines)
    for name, what in lines:
        display.print(f"{name:{width}}  {what}")


@define(eq=False)
class Run:
    """One run in progress."""

    pipeline: Pipeline
    ranks: Ranks
    homes: Homes
    """Who sees the run's folder."""
    display: Display
    signals: Signals
    events: Events
    rerun: Rerun
    chosen: frozenset[str]
    """The names of the stages that may be trained; the others are in the results if they are finished."""
    dataset: Dataset = field(init=False)
    evaluator: Evaluator | None = field(init=False, default=None)
    duplicates: int | None = field(init=False, default=None)
    """On the main process, how many of the held-out prompts are also training prompts; None if that is not known."""
    scores: list[report.Scores] = field(init=False, factory=list[report.Scores])
    drifts: dict[str, drift.Drifts] = field(init=False, factory=dict[str, drift.Drifts])
    rows: list[report.Row] = field(init=False, factory=list[report.Row])
    """The rows of results.json so far."""

    @property
    def folder(self) -> Path:
        return self.pipeline.run_folder

    @property
    def main(self) -> bool:
        return self.ranks.main

    def execute(self) -> None:
        """Run the whole pipeline."""
        if self.main:
            self._write_pipeline()
        self.events.run_started(precision(self.ranks))
        self._refuse_too_large()
        self._encode()
        prompts = self.evaluator and self.evaluator.prompts.manifest.key
        base, *targets = plan.targets(self.pipeline, self.dataset.key, prompts, precision(self.ranks))
        agreement.refuse_differences(self.ranks, {"weights of the base": base.weights.hash[:12]})
        self._note_data(base)
        left = {base.name: Weights(self.pipeline.backbone, None, self._half(self.pipeline.stage[0]))}
        self._evaluate(base, left[base.name], Cost(0, 0, 0))
        if self.main:
            self.rerun.write()
        done = [base]
        for stage, target in zip(self.pipeline.stage, targets, strict=True):
            if self._is_run(target, left):
                left[stage.name] = self._run_stage(stage, target, left[target.start])
                done.append(target)
        if self.main:
            self._report(done)

    def _is_run(self, target: Target, left: Mapping[str, Weights]) -> bool:
        """Return whether a stage is run: it was chosen, or it is finished and costs nothing more."""
        if target.name in self.chosen:
            return True
        return target.start in left and self.ranks.from_main(lambda: plan.is_done(target, self.rerun))

    def _refuse_too_large(self) -> None:
        device, world = estimate.Device.here(), self.ranks.world
        found = estimate.estimates(self.pipeline, device, world, graphs=False)
        estimate.refuse(self.pipeline, found, device, world)

    def _write_pipeline(self) -> None:
        write_toml(self.folder / "pipeline.toml", self.pipeline.record())

    def _note_data(self, base: Target) -> None:
        """Note in run.json what is known once the data are encoded and the base model's files are hashed."""
        counts: dict[str, Any] = {"examples": len(self.dataset)}
        if self.evaluator:
            counts["prompts"] = self.evaluator.count
        if self.duplicates is not None:
            counts["duplicates"] = self.duplicates
        if self.pipeline.data.left_out:
            counts["left_out"] = self.pipeline.data.left_out
        self.events.data_known(data=counts, base_hash=str(base.weights.parts["weights"])[:16])

    def _encode(self) -> None:
        """Encode data and prompts into latents and conditions, or find them in the cache."""
        self.dataset, prompts = encode(self.pipeline, self.ranks, self.display)
        if prompts and self.pipeline.eval:
            self.evaluator = Evaluator(self.pipeline.eval, prompts, self.ranks, self.dataset, self.display.print)
            if self.main:
                self._count_duplicates(self.evaluator)

    def _count_duplicates(self, evaluator: Evaluator) -> None:
        self.duplicates = duplicates(self.dataset, evaluator.prompts, evaluator.count)
        if self.duplicates:
            share = f"{self.duplicates} of {counted(evaluator.count, 'held-out prompt')}"
            self.display.print(f"eval: {share} {'is' if self.duplicates == 1 else 'are'} also in the training data")

    def _run_stage(self, stage: Stage, target: Target, before: Weights) -> Weights:
        """Train a stage unless it is finished, evaluate it, and return the weights that it leaves."""
        decision = self.ranks.from_main(lambda: plan.decide_training(target, self.rerun))
        if decision.reuse:
            self.display.print(f"{stage.name}: finished before, used as it is")
            self._restore_done(target, decision)
            cost, ending = Cost(**decision.record["cost"]), decision.record
        else:
            if self.main:
                self._prepare_folder(target, decision)
            self.ranks.barrier()
            cost, ending = self._train(stage, target, before)
            if self.main:
                status = {"finished": True, "cost": attrs.asdict(cost), "model": plan.hashes(target.folder / MODEL)}
                plan.write_done(target, {**status, "versions": versions(), **ending})
        self.homes.deliver(target.folder / MODEL)
        step = ending["alarm"]["step"] if "alarm" in ending else stage.steps
        self.events.stage_is(stage.name, "evaluating", cost, step)
        after = self._weights_after(stage, target.folder / MODEL, before)
        self._evaluate(target, after, cost, step)
        if self.main:
            card.keep(self.folder, stage.name, self.display.print)
        self.events.stage_is(stage.name, "done")
        return after

    def _half(self, stage: Stage) -> bool:
        """Return whether a stage holds the weights that it does not train in bfloat16."""
        return precision(self.ranks) == "bf16" and self.pipeline.freezes_in_half(stage)

    def _weights_after(self, stage: Stage, model: Path, before: Weights) -> Weights:
        if isinstance(self.pipeline.mode(stage), Lora):
            return Weights(before.backbone, model, self._half(stage))
        saved = before.backbone.from_saved(model)
        saved.place(self.ranks.device, text_dtype(self.ranks))
        return Weights(saved, None, half=False)

    def _prepare_folder(self, target: Target, decision: plan.Decision) -> None:
        """Prepare the stage's folder for training; the content of another stage is moved away, never overwritten.

        A kill between any two of these lines leaves no folder, or one of this stage; the next run continues with both.
        """
        name = target.folder.name
        if decision.supersede:
            former = plan.supersede(target.folder)
            self.display.print(f"{name}: {decision.reason}; the former one is in {former.parent.name}/{former.name}")
        elif decision.record or decision.problem:
            problem = decision.problem or decision.reason
            self.display.print(f"{name}: {problem}; it is trained again from its newest checkpoint")
        if decision.rounding:
            self.display.print(f"{name}: goes on {decision.rounding}")
        self.rerun.folder_moved(name)
        plan.write_done(target, {"finished": False})

    def _restore_done(self, target: Target, decision: plan.Decision) -> None:
        """Restore a damaged or missing done.json from its copy."""
        if self.main and decision.problem:
            self.display.print(f"{target.folder.name}: {decision.problem}; its copy is not, and it is written again")
            plan.write_done(target, decision.record)

    def _train(self, stage: Stage, target: Target, before: Weights) -> tuple[Cost, dict[str, Any]]:
        """Train a stage and save its weights; return the cost, and the alarm that ended it, if one did, for done.json.

        A signal stops it, after a checkpoint is written.
        """
        folder = target.folder
        memory.reset_peak(self.ranks.device)
        backbone = before.backbone
        with self.display.task(stage.name) as progress, self.signals.training():
            listener = StageEvents(self.events, self.signals, stage, folder, backbone, self.evaluator, progress)
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
                listener=listener,
            )
            with self._checkpoint_everywhere(folder / "checkpoints"):
                cost = loop.train(job, self.ranks)
            survived = self._save(stage, folder, backbone, listener.last_step)
        listener.finished()
        backbone.transformer = None
        memory.free_networks()
        self.ranks.barrier()
        return attrs.evolve(cost, survived=survived), listener.ending

    @contextmanager
    def _checkpoint_everywhere(self, folder: Path) -> Generator[None]:
        """Within, machines that do not share the run's folder have a copy of the checkpoint to go on from."""
        name = "" if self.homes.shared else self.ranks.from_main(lambda: _newest(folder))
        copied = bool(name) and self.homes.deliver(folder / name)
        try:
            yield
        finally:
            if copied:
                shutil.rmtree(folder / name, ignore_errors=True)

    def _save(self, stage: Stage, folder: Path, backbone: Backbone, steps: int) -> float | None:
        """Save a stage's weights, all or none; return the share of its update that rounding has left, if it rounds.

        steps  number of steps that the stage has taken
        """
        partial = folder / ".partial-model"
        if self.main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        half, mode = stage.save_dtype == "bf16", self.pipeline.mode(stage)
        survived = weights.save(backbone, partial, self.ranks, mode, in_bf16=half)
        if self.main and isinstance(mode, Lora):
            tables, examples = self.pipeline.record(), len(self.dataset)
            found = metadata.of_lora(tables, stage.name, backbone, steps=steps, examples=examples)
            metadata.stamp(partial, found)
        if self.main:
            files.publish(partial, folder / MODEL)
        return survived

    def _evaluate(self, target: Target, saved: Weights, cost: Cost, step: int = 0) -> None:
        """Evaluate weights as they were saved, unless their scores are in the folder already.

        step  how many steps they were trained
        """
        if self.evaluator is None:
            return
        scored, samples = scoring.score(target, saved, self.evaluator, self.display, step)
        if not self.homes.shared:  # where rank 0 does not see it, it has removed its own alone
            shutil.rmtree(target.folder / PARTIAL, ignore_errors=True)
        self.scores.append(scoring.scores_of(target, scored, self.evaluator, cost))
        if "drift" in scored:
            self.drifts[target.name] = drift.Drifts(**scored["drift"])
            if self.main:
                curve = drift.curve(self.drifts[target.name], self.drifts.get(target.start))
                files.write_json(target.folder / DRIFT, curve)
        if self.main:
            self._tell_scored(target, samples, step)

    def _tell_scored(self, target: Target, samples: Media | None, step: int) -> None:
        """Write results.json as far as it goes, and tell observers of its rows of the last of `scores`."""
        self.rows = report.results(self.scores)
        report.write_results(self.folder / RESULTS, self.rows)
        scored = Scored(
            name=target.name,
            folder=target.folder,
            step=step,
            values=self.scores[-1].values,
            categories=self.scores[-1].categories,
            rows=[row for row in self.rows if row["stage"] == target.name],
            samples=samples,
            grid=target.folder / "samples" / LAST,
            earlier=samples is None,
        )
        self.events.tell("scored", scored=scored)

    def _report(self, targets: Sequence[Target]) -> None:
        """Draw comparison.png and print the table; without [eval] remove what an earlier run with it has left."""
        results, comparison = self.folder / RESULTS, self.folder / "comparison.png"
        if self.evaluator:
            self.evaluator.compare([t.name for t in targets], [t.folder / "samples" for t in targets], comparison)
        else:  # those of a run that had an [eval]: the page would show them beside stages that may have changed
            results.unlink(missing_ok=True)
            comparison.unlink(missing_ok=True)
        report.print_table(self.scores, self.rows, self.display.console)


def _newest(checkpoints: Path) -> str:
    """Return the name of the newest whole checkpoint, "" if there is none."""
    newest, _ = checkpoint.latest(checkpoints)
    return newest.path.name if newest else ""


def _dry_run_lines(pipeline: Pipeline, ranks: Ranks, rerun: Rerun, chosen: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Yield (what, what would be done with it and why), in order."""
    eval, prompts, num_prompts = pipeline.eval, None, 0
    pipeline.backbone.place(ranks.device, text_dtype(ranks))
    dataset, _, text = preview(pipeline, pipeline.data, media=pipeline.needs_media)
    yield "data", text
    if eval:
        prompts, count, text = preview(pipeline, eval.data(pipeline.data.size), media=False)
        yield "prompts", text
        num_prompts = eval.count(count)
    targets = plan.targets(pipeline, dataset, prompts, precision(ranks))
    yield from plan.listing(pipeline, targets, rerun, num_prompts, chosen)
