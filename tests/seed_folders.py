"""Folders of runs that differ in their seed alone, as `corefit run` leaves them, made without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from corefit.run.folder import write_toml
from corefit.run.report import Scores, blocks_of, results, write_results
from corefit.system import files

PROMPTS = [f"{color} {thing}" for thing in ("cat", "dog", "owl") for color in ("red", "blue", "gray", "pink")]
CATEGORIES = ["cats", "dogs", "owls"]
STAGES = {"sft": "base", "soar": "base", "grpo": "soar"}
"""Stage -> what it starts from."""
SHARES = {"base": 0.4, "sft": 0.5, "soar": 0.6, "grpo": 0.7}
SIGMAS = [0.75, 0.5, 0.25, 0.0]
EVAL: Mapping[str, Any] = {
    "reward": [{"use": "ocr", "weight": 1.0}, {"use": "pick", "weight": 1.0}],
    "guidance": 3.5,
    "steps": 12,
    "diversity": {"prompts": 4, "samples": 8, "features": "pixels"},
    "drift": {"samples": 5, "start": 1.0},
}
STEPS = {"sft": 300, "soar": 200, "grpo": 50}


def write_seeds(folder: Path, seeds: Sequence[int] = (0, 1, 2), each: int = 4, name: str = "under") -> list[Path]:
    """Write runs NAME-0, NAME-1, ... whose prompts are scored `each` times; return their folders."""
    return [write_seed(folder / f"{name}-{seed}", seed, each) for seed in seeds]


def write_seed(run: Path, seed: int, each: int = 4, stages: Mapping[str, str] = STAGES) -> Path:
    """Write a finished run."""
    prompts = PROMPTS * each
    categories = [CATEGORIES[i % len(PROMPTS) // 4] for i in range(len(prompts))]
    entries = [
        {
            "name": name,
            "steps": STEPS[name],
            "batch": 8,
            "from": start,
            "objective": {"use": name, "chunk": 1 + seed},
            "log_every": 10 + seed,
        }
        for name, start in stages.items()
    ]
    pipeline = {"name": run.name, "seed": seed, "out": ".", "data": {"order": "epochs"}, "stage": entries, "eval": EVAL}
    write_toml(run / "pipeline.toml", pipeline)
    scored: list[Scores] = []
    for number, name in enumerate(("base", *stages)):
        content = _scores(name, seed if number else 0, prompts)
        parts = {"model": f"{name}{seed if number else ''}", "prompts": "p", "seed": 0, "eval": EVAL, "code": {}}
        content |= {"prompts": prompts, "categories": categories, "samples": "", "identity": "", "parts": parts}
        place = run / f"{number:02}-{name}"
        files.write_json(place / "scores.json", {**content, "rounding": {}})
        if number:
            files.write_json(place / "done.json", _done(name, stages[name], seed))
        units = {"ocr": "share", "pick": ""}
        start = stages.get(name, "")
        scored.append(Scores(name, content["values"], categories, prompts, units, blocks_of(content), start=start))
    write_results(run / "results.json", results(scored))
    return run


def _scores(stage: str, seed: int, prompts: Sequence[str]) -> dict[str, Any]:
    """Return scores of which a part is of the prompt alone, a part of the seed, and the rest of neither."""
    n, shared, own = len(prompts), np.random.default_rng(5), np.random.default_rng([seed, *stage.encode()])
    hard, luck = shared.normal(0, 0.3, n), own.normal(0, 0.05)
    chance = SHARES[stage] + luck + own.normal(0, 0.2, n)
    hits = (chance + hard > 0.5).astype(float)
    return {
        "values": {"ocr": hits.tolist(), "pick": (20 + chance + hard).tolist()},
        "diversity": {"rows": [0, 3, 6, 9], "values": {"vendi": (3 + own.random(4)).tolist()}},
        "also": {"rows": [*range(0, n, 2)], "values": {"ocr, 6 steps": hits[::2].tolist()}},
        "drift": {
            "sigmas": SIGMAS,
            "values": (own.random((5, 4)) * 0.1 + (1 - SHARES[stage]) * (1 - np.array(SIGMAS))).tolist(),
            "prompts": ["one", "two", "three", "three", "four"],
        },
    }


def _done(name: str, start: str, seed: int) -> dict[str, Any]:
    before = {"weights": "w", "backbone": {"use": "sd3"}, "code": {}}
    parts = {
        "before": before if start == "base" else {"stage": start, "identity": f"{start}{seed}"},
        "corefit": "0.1.0",
        "dataset": "d",
        "data": {"order": "epochs"},
        "precision": "fp32",
        "seed": seed,
        "stage": {"name": name, "steps": STEPS[name], "batch": 8, "objective": {"use": name}, "micro_batch": None},
        "train": {"use": "full"},
        "code": {"corefit_soar": "c"},
    }
    cost = {"seconds": 100.0 + seed, "samples_per_second": 16.0, "peak_memory": 2**30, "survived": None}
    return {"finished": True, "cost": cost, "parts": parts, "rounding": {}, "identity": f"{name}{seed}", "model": {}}
