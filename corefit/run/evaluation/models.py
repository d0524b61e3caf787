"""`corefit eval`: evaluates models on benchmarks, without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attrs import frozen

from corefit.data import cache
from corefit.data.dataset import Dataset
from corefit.pipeline.evaluation import Benchmark, Evaluation, Model
from corefit.run import agreement, identity, plan, report
from corefit.run.evaluation import scoring
from corefit.run.evaluation.evaluator import Evaluator
from corefit.run.evaluation.scoring import Weights
from corefit.run.folder import locked, write_toml
from corefit.run.plan import RESULTS, Target
from corefit.run.prepare import precision, text_dtype
from corefit.system import files
from corefit.system.display import Display
from corefit.system.ranks import Ranks, join
from corefit.system.signals import Signals, echo
from corefit.train.job import Cost
from corefit.types import Backbone, blame

NOTHING = Cost(0, 0, 0)


def evaluate(evaluation: Evaluation, display: Display | None = None) -> Path:
    """Score what is not scored yet, and return the evaluation's folder. Raises CorefitError; Stopped after a signal.

    Each benchmark has a folder, with one for each model, and its results as a table, a page and files.
    """
    ranks = join(evaluation.precision, evaluation.layout)
    display, folder = display or Display.on(ranks.main), evaluation.run_folder
    with Signals(display.print, echo(ranks.world)).handled():
        agreement.check(ranks, evaluation, "eval")
        with (
            locked(folder, ranks),
            display,
            ranks.share_failures(folder),
            blame.no_exit(),
            files.explain_write_errors(folder),
        ):
            if ranks.main:
                write_toml(folder / "evaluation.toml", evaluation.record())
            for benchmark in evaluation.benchmark:
                Judging(evaluation, benchmark, ranks, display).execute()
    return folder


@frozen(eq=False)
class Judging:
    """The evaluation of all models on one benchmark."""

    evaluation: Evaluation
    benchmark: Benchmark
    ranks: Ranks
    display: Display

    @property
    def folder(self) -> Path:
        return self.evaluation.run_folder / self.benchmark.name

    def execute(self) -> None:
        """Score all models, and write and print the results."""
        scores: list[report.Scores] = []
        targets: list[Target] = []
        for number, model in enumerate(self.evaluation.model):
            backbone, lora = model.resolved(self.evaluation.backbone)
            evaluator = Evaluator(self.benchmark, self._encoded(backbone), self.ranks, say=self.display.print)
            target = self._target(number, model, backbone, lora, evaluator.prompts)
            half = precision(self.ranks) == "bf16"
            found, _ = scoring.score(target, Weights(backbone, lora, half), evaluator, self.display)
            scores.append(scoring.scores_of(target, found, evaluator, NOTHING))
            targets.append(target)
            if self.ranks.main:
                self._report(scores, targets, evaluator)
        report.print_table(scores, report.results(scores), self.display.console, self.benchmark.name)

    def _encoded(self, backbone: Backbone) -> Dataset:
        """Return the prompts as this model encodes them; models with equal text encoders share the cache."""
        backbone.place(self.ranks.device, text_dtype(self.ranks))
        data, root = self.benchmark.data(self.evaluation.size), self.evaluation.folder / ".corefit" / "cache"
        with self.display.task("encoding prompts", idle="cached") as progress:
            folder = cache.prepare(data, backbone, root, media=False, progress=progress, ranks=self.ranks)
        backbone.release()
        return Dataset.open(folder, rebuildable=True)

    def _target(self, number: int, model: Model, backbone: Backbone, lora: Path | None, prompts: Dataset) -> Target:
        weights = identity.of_model(self.evaluation, backbone, plan.hashes(lora) if lora else {})
        agreement.refuse_differences(self.ranks, {f"weights of {model.name}": weights.hash[:12]})
        held = "bfloat16" if precision(self.ranks) == "bf16" else ""
        scores = identity.of_benchmark(self.evaluation, self.benchmark, weights, prompts.manifest.key, held)
        start = self.evaluation.model[0].name if number else ""
        return Target(model.name, start, self.folder / f"{number:02d}-{model.name}", weights, scores)

    def _report(self, scores: Sequence[report.Scores], targets: Sequence[Target], evaluator: Evaluator) -> None:
        """Write results.json, .csv and .md, comparison.png and report.html, as far as they go."""
        rows = report.results(scores)
        report.write_results(self.folder / RESULTS, rows)
        files.write_whole(self.folder / "results.csv", report.csv_text(rows).encode())
        files.write_whole(self.folder / "results.md", report.markdown(rows).encode())
        names, samples = [t.name for t in targets], [t.folder / "samples" for t in targets]
        evaluator.compare(names, samples, self.folder / "comparison.png")
        report.page(self.folder)
