"""Everything that a stage passes to the next one, to the evaluator and to the results: a test fails if it is cut.

The objective takes every weight that trains down by its learning rate in each step, so that weights tell what they
started from; its steps and the evaluator's rewards note what they were given.
"""

from __future__ import annotations

import itertools
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
from corefit.run.evaluation.evaluator import Evaluator
from corefit.run.run import run
from corefit.system import ranks

pytestmark = pytest.mark.usefixtures("uncollected")
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
BRANCHES = """\
[[stage]]
name = "three"
from = "one"
steps = 1
batch = 4
objective = { use = "down" }
optimizer = { lr = 0.05, weight_decay = 0 }

[[stage]]
name = "four"
from = "base"
steps = 1
batch = 4
train = { use = "lora", rank = 4, alpha = 10 }
objective = { use = "down" }
optimizer = { lr = 0.2, weight_decay = 0 }

[[stage]]
name = "five"
from = "two"
steps = 1
batch = 4
train = { use = "lora", rank = 4, alpha = 10 }
objective = { use = "down" }
optimizer = { lr = 0.3, weight_decay = 0 }

[[stage]]
name = "six"
steps = 1
batch = 4
train = { use = "lora", rank = 4, alpha = 10 }
objective = { use = "down" }
optimizer = { lr = 0.4, weight_decay = 0 }

[eval]
"""
"""base -> one -> three; base -> two -> five (a LoRA) -> six; base -> four (a LoRA). `two` says that it is from base."""
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


def brightness(pipeline: Pipeline, model: Path | None, adapter: Path | None = None) -> torch.Tensor:
    """Return the scores of the reward `bright` per held-out prompt, with weights that stages saved; None: the base."""
    backbone = pipeline.backbone.from_saved(model) if model else pipeline.backbone
    backbone.load(torch.device("cpu"), torch.float32)
    if adapter:
        backbone.load_lora(adapter)
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
    assert (folder / "01-one/model/README.md").is_file(), "no card, though one sample is kept"
    # the first stage starts from the base, and the second from what the first left
    assert fall(start(chain, one), one) == pytest.approx(2 * first, rel=1e-3)
    assert fall(one, two) == pytest.approx(second, rel=1e-3)
    evaluated_is_what_was_saved(pipeline, folder, lora=bool(settings))
    # a finished stage is handed on as one that was just trained
    run(read(chain.file, [*settings, "stage.two.steps=2"]))
    assert fall(one, left(folder / "02-two")) == pytest.approx(2 * second, rel=1e-3)


def test_what_is_handed_on_to_branches(chain):
    chain.write(PIPELINE.replace("[eval]\n", BRANCHES))
    pipeline = read(chain.file, ["stage.two.from=base"])
    folder = run(pipeline)
    names = ("one", "two", "three", "four", "five", "six")
    models = {name: folder / f"{number:02d}-{name}" for number, name in enumerate(names, 1)}
    weights = {name: left(path) for name, path in models.items()}
    base = start(chain, weights["one"])
    assert fall(base, weights["one"]) == pytest.approx(0.02, rel=1e-3)
    assert fall(base, weights["two"]) == pytest.approx(0.03, rel=1e-3), "not from one"
    assert fall(weights["one"], weights["three"]) == pytest.approx(0.05, rel=1e-3), "not from two"
    # a LoRA of the base is not that of another branch, and one that follows a LoRA goes on with it
    zeros = start(chain, weights["four"])
    assert fall(zeros, weights["four"]) == pytest.approx(0.2, rel=1e-3)
    assert fall(zeros, weights["five"]) == pytest.approx(0.3, rel=1e-3)
    assert fall(weights["five"], weights["six"]) == pytest.approx(0.4, rel=1e-3)
    full = {name: path / "model" for name, path in models.items()}
    on = {"base": None, "one": full["one"], "two": full["two"], "three": full["three"], "four": None}
    scores = {name: brightness(pipeline, model) for name, model in on.items() if name != "four"}
    scores["four"] = brightness(pipeline, None, full["four"])
    scores["five"], scores["six"] = (brightness(pipeline, full["two"], full[name]) for name in ("five", "six"))
    starts = {"one": "base", "two": "base", "three": "one", "four": "base", "five": "two", "six": "five"}
    found = rows(folder, "bright")
    for name, values in scores.items():
        row = found[name, "all"]
        assert row["value"] == pytest.approx(float(values.mean()), abs=1e-5)
        assert row.get("start") == starts.get(name)
        for key, before in (("gain", starts.get(name)), ("base_gain", "base")) if name in starts else ():
            assert row[key] == pytest.approx(float((values - scores[before]).mean()), abs=1e-5)
    values = [float(v.mean()) for v in scores.values()]
    assert min(abs(a - b) for a, b in itertools.combinations(values, 2)) > 2e-5, "or this would show nothing"
    # a finished stage is handed on as one that was just trained
    run(read(chain.file, ["stage.two.from=base", "stage.three.steps=2"]))
    assert fall(weights["one"], left(models["three"])) == pytest.approx(0.1, rel=1e-3)


def start(chain: Project, left: Weights) -> Weights:
    """Return what the tensors that the first stage saved were before it: the base, or a new LoRA's zeros."""
    (file,) = (chain.folder / "base" / "transformer").glob("*.safetensors")
    base = load_file(file)
    zeros = {name: torch.zeros_like(t) for name, t in left.items() if ".lora_B." in name}
    return zeros or {name: base[name] for name in left}


def evaluated_is_what_was_saved(pipeline: Pipeline, folder: Path, *, lora: bool) -> None:
    """results.json has each stage's own weights, prompts in their order, and gains over the stage before."""
    models = {"base": None, "one": folder / "01-one" / "model", "two": folder / "02-two" / "model"}
    means = {
        name: brightness(pipeline, None if lora else model, model if lora else None) for name, model in models.items()
    }
    found, before = rows(folder, "bright"), None
    for name, now in means.items():
        # held out: three of a sky, then three of a sea
        for category, part in (("all", slice(0, 6)), ("sky", slice(0, 3)), ("sea", slice(3, 6))):
            row = found[name, category]
            assert row["value"] == pytest.approx(float(now[part].mean()), abs=1e-5)
            if before is not None:
                assert row["gain"] == pytest.approx(float((now - before)[part].mean()), abs=1e-5)
        if before is not None:
            assert float((now - before).mean().abs()) > 2e-5, "the stages must differ for this to show anything"
        before = now
    assert {key: row["value"] for key, row in rows(folder, "sky").items()} == {
        (name, category): value for name in models for category, value in (("all", 0.5), ("sky", 1.0), ("sea", 0.0))
    }
