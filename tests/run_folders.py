"""Run folders as a run leaves them, or had left them in its middle, made without training: for tests of the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from safetensors.numpy import save_file

from corefit.run.report import MetricsLog, grid
from corefit.run.report.results import Block, Scores, results, write_results
from corefit.system import files

CATEGORIES = ("single", "two", "counting")
PROMPTS = [
    f"{count} {color} {thing}"
    for count in ("one", "two", "three")
    for color in ("red", "blue")
    for thing in ("cat", "<b>dog</b>")
]
EVAL = {
    "reward": [{"use": "ocr", "weight": 1.0}, {"use": "pickscore", "weight": 1.0}],
    "guidance": 4.5,
    "steps": 40,
    "diversity": {"prompts": 12, "samples": 8, "features": "pixels"},
}
EACH = 20
"""Times that every prompt is scored."""


@frozen
class Stage:
    """One stage to be written: its chance of a success, its mean of another metric, and how many steps are done."""

    name: str
    share: float
    judged: float
    start: str = ""
    steps: int = 0
    done: int = 0
    alarm: int = 0


BASE = Stage("base", 0.4, 20.0)
SOAR = Stage("soar", 0.6, 20.9, "base", 200, 200)
GRPO = Stage("grpo", 0.72, 20.2, "soar", 120, 120, alarm=90)
SFT = Stage("sft", 0.41, 20.02, "base", 200, 200)


def write_run(
    folder: Path, stages: Sequence[Stage] = (BASE, SFT, SOAR, GRPO), status: str = "finished", size: int = 48
) -> Path:
    """Write a run's folder with `stages`, of which those that are not done have no scores yet."""
    scored = [stage for stage in stages if stage.done == stage.steps]
    for number, stage in enumerate(stages):
        place = folder / f"{number:02}-{stage.name}"
        place.mkdir(parents=True)
        _log(place, stage)
        if stage in scored:
            _evaluate(place, stage, size)
    rows = results([_scores(stage) for stage in scored])
    write_results(folder / "results.json", rows)
    _about(folder, stages, status)
    return folder


def _draws(stage: Stage) -> np.random.Generator:
    return np.random.default_rng([*stage.name.encode()])


def _scores(stage: Stage) -> Scores:
    n, shared = len(PROMPTS) * EACH, np.random.default_rng(0)
    hits, noise = shared.random(n) < stage.share, shared.normal(0, 1, n)
    own = _draws(stage).normal(0, 0.3, n)
    values = {"ocr": hits.astype(float).tolist(), "pickscore": (stage.judged + noise + own).round(3).tolist()}
    vendi = (4.0 - 2 * stage.share + 0.1 * _draws(stage).random(12)).tolist()
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(n)]
    return Scores(
        stage.name,
        values,
        [CATEGORIES[i % len(PROMPTS) // 4] for i in range(n)],
        prompts=prompts,
        units={"ocr": "share", "pickscore": ""},
        blocks=[Block(range(12), {"vendi": vendi})],
        start=stage.start,
    )


def _evaluate(place: Path, stage: Stage, size: int) -> None:
    scores = _scores(stage)
    media = pictures(len(PROMPTS), size, stage.share)
    (place / "samples").mkdir(exist_ok=True)
    save_file({"media": media}, place / "samples" / "last.safetensors")
    written = {
        "values": scores.values,
        "categories": scores.categories,
        "prompts": scores.prompts,
        "diversity": {"rows": [*scores.blocks[0].rows], "values": scores.blocks[0].values},
        "samples": files.sha256(place / "samples" / "last.safetensors"),
    }
    parts = {"model": files.json_digest({"stage": stage.name}), "prompts": "p", "seed": 0, "eval": EVAL, "code": {}}
    files.write_json(place / "scores.json", {**written, "identity": "", "parts": parts, "rounding": {}})
    sigmas = np.linspace(0.05, 1, 12)
    drift = (1 - stage.share) * (1 - sigmas)
    curve = {"sigmas": sigmas, "drift": drift, "low": 0.9 * drift, "high": 1.1 * drift}
    (place / "drift.json").write_text(json.dumps({name: values.tolist() for name, values in curve.items()}))


def pictures(count: int, size: int, sharp: float) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return [count, 3, size, size]: a disc of another hue in each, the sharper the clearer."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    found = np.empty((count, 3, size, size))
    for i in range(count):
        edge = np.clip(0.5 + (0.3 - np.hypot(x - 0.1 * np.sin(i), y - 0.1 * np.cos(i))) * (4 + 30 * sharp), 0, 1)
        hue = 0.5 + 0.5 * np.cos(2 * np.pi * (i / count + np.arange(3) / 3))
        found[i] = edge * hue[:, None, None] + (1 - edge) * (0.85 + 0.1 * y)
    return (found * 255).astype(np.uint8)


def _log(place: Path, stage: Stage) -> None:
    draws, log = _draws(stage), MetricsLog(place / "metrics.jsonl")
    for step in range(2, stage.done + 1, 2):
        line = {"loss": 1 / step + 0.02 * draws.random(), "grad_norm": 0.5 + 0.2 * draws.random(), "lr": 1e-3}
        if stage.name == "grpo":
            line |= {"reward": 0.5 + step / 600 + 0.1 * draws.random(), "held_out/pickscore": 20.9 - step / 200}
            line |= {"alarm": 1.0} if step == stage.alarm else {}
        log.append(step, {**line, "seconds": 0.5 * step, "samples_per_second": 90.0})
    for step in range(50, stage.done + 1, 50):
        media = pictures(len(PROMPTS), 96, stage.share * step / stage.steps) / 255
        grid(media, PROMPTS, place / "samples" / f"step-{step:06}.png")


def _about(folder: Path, stages: Sequence[Stage], status: str) -> None:
    entries: list[Mapping[str, Any]] = [
        {
            "name": stage.name,
            "folder": f"{number:02}-{stage.name}",
            "start": stage.start,
            "steps": stage.steps,
            "step": stage.done,
            "state": "done" if stage.done == stage.steps else "training" if stage.done else "waiting",
            "seconds": 0.5 * stage.done,
            "samples_per_second": 90.0,
            "peak_memory": 3 << 30,
            "energy_joules": 51_000.0,
        }
        for number, stage in enumerate(stages)
        if stage.steps
    ]
    about = {
        "name": folder.name,
        "status": status,
        "started": "2026-11-21T22:10:00+00:00",
        "changed": "2026-11-21T23:40:00+00:00",
        "versions": {"corefit": "0.1.0", "torch": "2.9.1"},
        "commit": "5071097",
        "devices": ["NVIDIA H200"],
        "processes": 1,
        "precision": "bf16",
        "seed": 0,
        "base": {"name": "stable-diffusion-3.5-medium", "hash": "3b4880a69f75423d1d5d59eee6dbbfcf172c40df"},
        "data": {"examples": 8192, "prompts": 12, "left_out": 0, "duplicates": 3},
        "stages": entries,
    }
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "pipeline.toml").write_text(
        f'name = "{folder.name}"\nseed = 0\nplugins = ["/home/somebody/project/mine.py"]\n[backbone]\nuse = "sd3"\n'
        'path = "/home/somebody/models/sd3"\n'
        + "".join(f'[[stage]]\nname = "{stage.name}"\nsteps = {stage.steps}\nbatch = 4\n' for stage in stages[1:])
        + '[[observer]]\nuse = "wandb"\napi_key = "0123456789abcdef"\nproject = "trees"\n'
    )
