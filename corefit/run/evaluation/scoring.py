"""Scores weights on held-out prompts, as they were saved, and keeps scores and samples in the stage's folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen

from corefit.run import plan, report
from corefit.run.evaluation import extremes
from corefit.run.evaluation.evaluator import LAST, SAMPLES, Evaluator, Media
from corefit.run.evaluation.partial import PARTIAL, PartialScores
from corefit.run.events import grid_of
from corefit.run.plan import DRIFT, SCORES, Target
from corefit.system import files, memory
from corefit.system.display import Display
from corefit.train import weights
from corefit.train.job import Cost
from corefit.types import Backbone


@frozen
class Weights:
    """The weights that a stage starts from, or leaves: those of a backbone, and perhaps a LoRA on top of them."""

    backbone: Backbone
    adapter: Path | None
    half: bool
    """Whether the backbone's weights are held in bfloat16, in training and therefore in evaluation."""


def score(
    target: Target, saved: Weights, evaluator: Evaluator, display: Display, step: int = 0
) -> tuple[Mapping[str, Any], Media | None]:
    """Score weights, unless their scores are in the target's folder already; all ranks call it.

    Return the content of scores.json, and on the main process the samples, if it scored anew.

    step  how many steps the weights were trained
    """
    decision = evaluator.ranks.from_main(lambda: plan.decide_evaluation(target))
    if decision.problem:
        display.print(f"{target.folder.name}: {decision.problem}; it is evaluated again")
    found = (decision.record, None) if decision.reuse else _score(target, saved, evaluator, display, step)
    if evaluator.ranks.main:
        shutil.rmtree(target.folder / PARTIAL, ignore_errors=True)
    saved.backbone.release()
    saved.backbone.transformer = None
    memory.free_networks()
    return found


def scores_of(target: Target, scored: Mapping[str, Any], evaluator: Evaluator, cost: Cost) -> report.Scores:
    """Return the content of scores.json for the table."""
    return report.Scores(
        target.name,
        scored["values"],
        scored["categories"],
        prompts=scored.get("prompts") or evaluator.texts()["prompts"],  # version 0.1 wrote none
        units={entry.name: getattr(entry.value, "unit", "") for entry in evaluator.eval.reward},
        blocks=report.blocks_of(scored),
        start=target.start,
        **attrs.asdict(cost),
    )


def _score(
    target: Target, saved: Weights, evaluator: Evaluator, display: Display, step: int
) -> tuple[dict[str, Any], Media | None]:
    """Score the held-out prompts with weights read from their files, and write scores.json and the samples."""
    assert target.scores is not None
    backbone = saved.backbone
    partial = PartialScores(target.folder / PARTIAL, target.scores.hash)
    weights.load(backbone, evaluator.ranks, frozen_in_bf16=saved.half, adapter=saved.adapter)
    weights.prepare(backbone, evaluator.ranks, evaluation=True)  # as in training
    with display.task(f"{target.name}: {evaluator.count} held-out prompts") as progress:
        scored, samples = evaluator.score(backbone, progress, partial)
    if evaluator.eval.diversity:
        with display.task(f"{target.name}: diversity") as progress:
            scored["diversity"] = evaluator.diversity(backbone, scored["prompts"], progress)
    if evaluator.eval.others and evaluator.eval.reward:
        with display.task(f"{target.name}: other settings") as progress:
            scored["also"] = evaluator.also(backbone, scored["prompts"], progress)
    if evaluator.eval.drift:
        with display.task(f"{target.name}: drift") as progress:
            scored["drift"] = evaluator.drift(backbone, progress)
    best_and_worst = evaluator.extremes(backbone, scored["values"])
    evaluator.ranks.accelerator.free_memory()
    if evaluator.ranks.main and samples:
        for former in (SCORES, DRIFT):  # they do not belong to the new samples
            (target.folder / former).unlink(missing_ok=True)
        evaluator.keep_samples(samples, target.folder / "samples")
        extremes.write(target.folder / "samples", *best_and_worst)
        if step:  # the last of the stage's own grids is that of the weights as they were saved
            last = (target.folder / "samples" / LAST).read_bytes()
            files.write_whole(grid_of(target.folder, step), last)
        content = {**scored, "samples": files.sha256(target.folder / "samples" / SAMPLES)}
        identity = {"parts": target.scores.parts, "rounding": target.scores.rounding}
        files.write_json(target.folder / SCORES, {**content, "identity": target.scores.hash, **identity})
    return scored, samples
