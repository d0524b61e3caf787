"""Everything that a stage passes to the next one, to the evaluator and to the results: a test fails if it is cut.

The objective takes every weight that trains down by its learning rate in each step, so that weights tell what they
started from; its steps and the evaluator's rewards note what they were given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Project
from safetensors.torch import load_file

from corefit.data.dataset import Dataset
from corefit.pipeline import Pipeline, read
from corefit.run.evaluate import Evaluator
from corefit.run.run import run
from corefit.system import ranks

PLUGIN = '''
from attrs import frozen
from corefit import Reward, Supervised, Term, hookimpl


@frozen
class Down(Supervised):
    """Every weight that trains falls by the learning rate in each step."""

    def terms(self, batch, ctx):
        assert all(f"a picture of a {c} sky" == p for c, p in zip(map(colour, batch.meta), batch.prompts, strict=True))
        total = sum(p.sum() for p in ctx.backbone.transformer.parameters() if p.requires_grad)
        yield Term(total, 1.0)


def colour(meta):
    return ("red", "green", "blue")[meta["number"] % 3]


@frozen
class Bright(Reward):
    """Mean of all pixels."""

    def score(self, media, prompts, meta):
        return media.flatten(1).mean(1)


@frozen
class Sky(Reward):
    """1 where the prompt is of a sky, and its category says so."""

    def score(self, media, prompts, meta):
        return [float(p.endswith("sky") and m["category"] == "sky") for p, m in zip(prompts, meta, strict=True)]


@hookimpl
def corefit_objectives():
    return {"down": Down}


@hookimpl
def corefit_rewards():
    return {"bright": Bright, "sky": Sky}
'''
PIPELINE = """\
name = "chain"
plugins = ["chain.py"]
precision = "fp32"

[backbone]
use = "sd3"
path = "base"
max_sequence_length = 16

[data]
source = { use = "jsonl", path = "train.jsonl" }
size = [16, 16]

[[stage]]
name = "one"
steps = 2
batch = 4
objective = { use = "down" }
optimizer = { lr = 0.01, weight_decay = 0 }

[[stage]]
name = "two"
steps = 1
batch = 4
objective = { use = "down" }
optimizer = { lr = 0.03, weight_decay = 0 }

[eval]
prompts = "heldout.jsonl"
reward = [{ use = "bright" }, { use = "sky" }]
steps = 2
batch = 4
samples = 1
"""
LORA = ("backbone.train={use='lora', rank=4, alpha=10}", "stage.one.optimizer.lr=0.2", "stage.two.optimizer.lr=0.3")
POSITIONS = "pos_embed.pos_embed"
"""A table in the transformer's file that is no weight."""
Weights = Mapping[str, torch.Tensor]


@pytest.fixture
def chain(project: Project) -> Project:
    (project.folder / "chain.py").write_text(PLUGIN)
    project.write(PIPELINE)
    return project


def left(stage: Path) -> Weights:
    """The tensors of the transformer, or of its LoRA, that a stage left."""
    files = [*stage.glob("model/transformer/*.safetensors"), *stage.glob("model/*.safetensors")]
    return {name: t for file in files for name, t in load_file(file).items() if name != POSITIONS}


def fall(before: Weights, after: Weights) -> float:
    """By how much the weights of `before` are lower, which must be the same for each of them."""
    assert before.keys() <= after.keys()
    falls = torch.cat([(before[name] - after[name]).flatten() for name in before])
    assert len(falls) > 1000
    assert float(falls.max() - falls.min()) < 1e-5
    return float(falls.mean())


def brightness(pipeline: Pipeline, model: Path | None, *, lora: bool) -> torch.Tensor:
    """Return the scores of the reward `bright` per held-out prompt, with the weights that a stage saved; None: base."""
    backbone = pipeline.backbone.from_saved(model) if model and not lora else pipeline.backbone
    backbone.load(torch.device("cpu"), torch.float32)
    if model and lora:
        backbone.load_lora(model)
    caches = [Dataset.open(done.parent) for done in pipeline.folder.glob(".corefit/cache/*/done.json")]
    (prompts,) = (cache for cache in caches if not cache.has_media)
    assert pipeline.eval is not None
    evaluator = Evaluator(pipeline.eval, prompts, ranks.join("fp32"))
    return torch.cat([evaluator.media(backbone, [row]) for row in range(6)]).flatten(1).mean(1).double()


def rows(folder: Path, metric: str) -> dict[tuple[str, str], Any]:
    """Read results.json, by stage and category."""
    every = json.loads((folder / "results.json").read_text())
    return {(row["stage"], row["category"]): row for row in every if row["metric"] == metric}


@pytest.mark.parametrize(("settings", "first", "second"), [((), 0.01, 0.03), (LORA, 0.2, 0.3)], ids=["full", "lora"])
def test_what_is_handed_on(chain, settings, first, second):
    pipeline = read(chain.file, settings)
    folder = run(pipeline)
    one, two = (left(folder / name) for name in ("01-one", "02-two"))
    # the first stage starts from the base, and the second from what the first left
    assert fall(start(chain, one), one) == pytest.approx(2 * first, rel=1e-3)
    assert fall(one, two) == pytest.approx(second, rel=1e-3)
    evaluated_is_what_was_saved(pipeline, folder, lora=bool(settings))
    # a finished stage is handed on as one that was just trained
    run(read(chain.file, [*settings, "stage.two.steps=2"]))
    assert fall(one, left(folder / "02-two")) == pytest.approx(2 * second, rel=1e-3)


def start(chain: Project, left: Weights) -> Weights:
    """Return what the tensors that the first stage saved were before it: the base, or a new LoRA's zeros."""
    (file,) = (chain.folder / "base" / "transformer").glob("*.safetensors")
    base = load_file(file)
    zeros = {name: torch.zeros_like(t) for name, t in left.items() if ".lora_B." in name}
    return zeros or {name: base[name] for name in left}


def evaluated_is_what_was_saved(pipeline: Pipeline, folder: Path, *, lora: bool) -> None:
    """results.json has each stage's own weights, prompts in their order, and gains over the stage before."""
    models = {"base": None, "one": folder / "01-one" / "model", "two": folder / "02-two" / "model"}
    means = {name: brightness(pipeline, model, lora=lora) for name, model in models.items()}
    found, before = rows(folder, "bright"), None
    for name, now in means.items():
        # held out: three of a sky, then three of a sea
        for category, part in (("all", slice(0, 6)), ("sky", slice(0, 3)), ("sea", slice(3, 6))):
            row = found[name, category]
            assert row["value"] == pytest.approx(float(now[part].mean()), abs=1e-5)
            if before is not None:
                assert row["gain"] == pytest.approx(float((now - before)[part].mean()), abs=1e-5)
        if before is not None:
            assert float((now - before).mean().abs()) > 1e-3, "the stages must differ for this to show anything"
        before = now
    assert {key: row["value"] for key, row in rows(folder, "sky").items()} == {
        (name, category): value for name in models for category, value in (("all", 0.5), ("sky", 1.0), ("sea", 0.0))
    }
