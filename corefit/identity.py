"""What determines a stage's result, as a hash: a finished stage is recognised by it and not run again."""

from __future__ import annotations

import hashlib
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

from attrs import has

import corefit
from corefit.config import Reader
from corefit.pipeline import CHOICES, Pipeline
from corefit.stage import Stage

QUIET = ("log_every", "checkpoint_every", "keep", "sample_every")
"""Keys of a stage that change what is shown and kept, not what is learned."""


def of_base(pipeline: Pipeline) -> str:
    """Of the weights that the first stage starts from."""
    return _hash({"weights": pipeline.backbone.weights_key(), **_backbone(pipeline)})


def of_stage(pipeline: Pipeline, stage: Stage, before: str, dataset: str, precision: str) -> str:
    """Of a stage's weights; `before` is what it starts from, `dataset` the key of its encoded data."""
    tables = _tables(pipeline, stage)
    return _hash(
        {
            "corefit": corefit.__version__,
            "before": before,
            "dataset": [dataset, pipeline.data.order],
            "precision": precision,
            "seed": pipeline.seed,
            "stage": {key: value for key, value in tables.items() if key not in QUIET},
            "train": _tables(pipeline, pipeline.mode(stage)),
            "code": _code(stage),
            **_backbone(pipeline),
        }
    )


def of_scores(pipeline: Pipeline, weights: str, dataset: str) -> str:
    """Of the held-out scores of weights."""
    return _hash(
        {
            "weights": weights,
            "prompts": dataset,
            "eval": {k: v for k, v in _tables(pipeline, pipeline.eval).items() if k != "samples"},
            "seed": pipeline.seed,
            "code": _code(pipeline.eval),
        }
    )


def _backbone(pipeline: Pipeline) -> dict[str, Any]:
    tables = {k: v for k, v in _tables(pipeline, pipeline.backbone).items() if k != "path"}
    return {"backbone": tables, "backbone_code": _code(pipeline.backbone)}


def _tables(pipeline: Pipeline, value: Any) -> dict[str, Any]:
    return Reader(pipeline.host, pipeline.folder, CHOICES).tables(value)


def _code(value: Any) -> dict[str, str]:
    """Module -> hash of the source, for the class of `value` and of everything inside it that is not corefit's."""
    found: dict[str, str] = {}
    if isinstance(value, (list, tuple)):
        for item in value:  # pyright: ignore[reportUnknownVariableType]
            found |= _code(item)
    elif has(type(value)):
        top = type(value).__module__.partition(".")[0]
        if top != "corefit":
            found[top] = _source(top)
        for name in getattr(type(value), "__attrs_attrs__", ()):
            if name.init:
                found |= _code(getattr(value, name.name))
    return found


@cache
def _source(module: str) -> str:
    """Hash of all Python files of a package, or of the one file of a module."""
    file = Path(getattr(sys.modules[module], "__file__", None) or module)
    files = sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files if f.is_file())).hexdigest()


def _hash(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
