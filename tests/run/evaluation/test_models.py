"""`corefit eval`: models on benchmarks, scored as a run scores them, resumed, and refused with a sentence."""

from __future__ import annotations

import csv
import json

import pytest
from conftest import Project
from PIL import Image

from corefit.errors import ConfigError
from corefit.pipeline.evaluation import Model, read_evaluation
from corefit.run.evaluation.evaluator import Evaluator
from corefit.run.evaluation.models import evaluate

RUN = """
[[stage]]
name = "sft"
steps = 1
batch = 4
train = { use = "full" }
objective = { use = "sft" }

[[stage]]
name = "lora"
steps = 1
batch = 4
train = { use = "lora", rank = 4 }
objective = { use = "sft" }
optimizer = { lr = 0.1 }

[eval]
prompts = ["a red sky", "a blue sea", "a green sea"]
reward = [{ use = "bright" }]
steps = 2
"""
EVALUATION = """
name = "all"
plugins = ["bright.py"]
size = [16, 16]

[backbone]
use = "sd3"
path = "base"
max_sequence_length = 16

[[model]]
name = "base"

[[model]]
name = "sft"
path = "runs/tiny/01-sft/model"

[[model]]
name = "lora"
stage = "runs/tiny/02-lora"

[[benchmark]]
name = "skies"
prompts = ["a red sky", "a blue sea", "a green sea"]
reward = [{ use = "bright" }]
steps = 2

[[benchmark]]
name = "grids"
prompts = "heldout.csv"
steps = 1
"""


@pytest.fixture
def evaluation(project: Project) -> Project:
    """A run of two stages, and an evaluation of its models."""
    head = project.text.partition("\n[[stage]]\n")[0]
    (project.folder / "eval.toml").write_text(EVALUATION)
    (project.folder / "heldout.csv").write_text("Prompts,Category\na red sky,Colors\na blue sea,Colors\n")
    project.write(head + RUN)
    return project


def test_models_score_as_in_the_run_that_made_them(evaluation, monkeypatch):
    assert evaluation.main("run", "pipeline.toml").status == 0
    ended = evaluation.main("eval", "eval.toml")
    assert ended.status == 0, ended.err
    run, folder = evaluation.folder / "runs" / "tiny", evaluation.folder / "evals" / "all"
    assert ended.out.splitlines()[-1] == f"all of it is in {folder}"
    assert "skies: bright, 3 held-out prompts" in ended.out
    assert "over base" in ended.out
    for number, name in enumerate(("base", "sft", "lora")):
        mine, theirs = (
            json.loads((place / f"{number:02d}-{name}" / "scores.json").read_text())["values"]
            for place in (folder / "skies", run)
        )
        assert mine == theirs, name
    rows = json.loads((folder / "skies" / "results.json").read_text())
    assert [(row["stage"], row.get("start")) for row in rows] == [("base", None), ("sft", "base"), ("lora", "base")]
    with (folder / "skies" / "results.csv").open() as file:
        assert [row["stage"] for row in csv.DictReader(file)] == ["base", "sft", "lora"]
    assert "| lora |" in (folder / "skies" / "results.md").read_text()
    for benchmark in ("skies", "grids"):
        assert "data:image/" in (folder / benchmark / "report.html").read_text()
        with Image.open(folder / benchmark / "comparison.png") as drawn:
            assert drawn.width > 100
    # nothing is done twice, and what was cut off is done again
    before = (folder / "skies" / "results.json").read_bytes()
    (folder / "skies" / "01-sft" / "scores.json").unlink()
    scored: list[int] = []
    inner = Evaluator.score

    def score(self: Evaluator, *args, **keys):
        scored.append(self.count)
        return inner(self, *args, **keys)

    monkeypatch.setattr(Evaluator, "score", score)
    evaluate(read_evaluation(evaluation.folder / "eval.toml"))
    assert scored == [3]
    assert (folder / "skies" / "results.json").read_bytes() == before


def test_a_stage_is_found_with_all_that_its_lora_lies_on(evaluation):
    run = evaluation.folder / "runs" / "tiny"
    base = read_evaluation(evaluation.folder / "eval.toml", ["model=[{ name = 'base' }]"]).backbone
    for stage in ("01-sft", "02-lora", "03-more", "04-side"):
        (run / stage / "model").mkdir(parents=True)
    (run / "01-sft" / "model" / "model_index.json").write_text("{}")
    stages = [{"name": "sft"}, {"name": "lora"}, {"name": "more"}, {"name": "side", "from": "base"}]
    text = "".join(f"[[stage]]\nname = '{s['name']}'\nfrom = '{s.get('from', '')}'\n" for s in stages)
    (run / "pipeline.toml").write_text(text)
    found = {stage: Model(name="x", stage=run / stage).resolved(base) for stage in ("01-sft", "03-more", "04-side")}
    assert str(found["01-sft"][0].path) == str(run / "01-sft" / "model")
    assert found["01-sft"][1] is None
    assert str(found["03-more"][0].path) == str(run / "01-sft" / "model"), "through the stage between them"
    assert found["03-more"][1] == run / "03-more" / "model"
    assert found["04-side"][0] is base, "it branches from the base"
    assert found["04-side"][1] == run / "04-side" / "model"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('stage = "runs/tiny/02-lora"', 'stage = "runs/tiny/02-lara"', "model.lora: stage: .* is no finished stage"),
        ('stage = "runs/tiny/02-lora"', 'lora = "nowhere"', "model.lora: lora: there is no folder"),
        ('path = "runs/tiny/01-sft/model"', 'path = "./nowhere"', r"model.sft: .*nowhere"),
        ('name = "lora"\n', 'name = "sft"\n', "model.sft: two have this name; rename one"),
        ('name = "grids"', 'name = "skies"', "benchmark.skies: two have this name; rename one"),
        ('prompts = "heldout.csv"', 'prompts = "nothing.csv"', "benchmark.grids.prompts: .*nothing.csv"),
        ('{ use = "bright" }', '{ use = "brigth" }', "did you mean 'bright'"),
        ("size = [16, 16]", "size = [16]", r"size is \[16\]"),
        ("steps = 1\n", "steps = 1\ndrift = { samples = 4 }\n", "benchmark.grids.drift: it needs the media"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(evaluation, old, new, problem):
    file = evaluation.folder / "eval.toml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=problem):
        read_evaluation(file)
    ended = evaluation.main("eval", "eval.toml")
    assert ended.status == 2
    assert not (evaluation.folder / "evals").exists()
