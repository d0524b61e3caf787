"""Runs of which nothing is scored leave grids and a page; those without prompts the page alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Project
from PIL import Image

from corefit.pipeline import read
from corefit.run.run import Run, run

STAGE = """
[[stage]]
name = "sft"
steps = 2
batch = 4
objective = { use = "sft" }
sample_every = 1

[eval]
prompts = ["a red sky", "a  Picture of a BLUE sky", "a green sea"]
steps = 2
"""


@pytest.fixture
def unscored(project: Project) -> Project:
    """SFT, and samples of three prompts that the pipeline file lists, one of which is trained on."""
    project.write(project.text.partition("\n[[stage]]\n")[0] + STAGE)
    return project


def width(file: Path) -> int:
    with Image.open(file) as picture:
        return picture.width


def test_without_a_reward_samples_are_drawn_and_compared(unscored):
    ended = unscored.main("run", "pipeline.toml")
    assert ended.status == 0, ended.err
    folder = unscored.folder / "runs" / "tiny"
    said = ended.out.splitlines()
    assert "eval: 1 of 3 held-out prompts is also in the training data" in said
    assert said[-1] == f"all of it is in {folder}"
    assert json.loads((folder / "results.json").read_text()) == []
    assert "data:image/" in (folder / "report.html").read_text()
    grids = sorted(path.name for path in (folder / "01-sft" / "samples").iterdir())
    assert grids == ["last.png", "last.safetensors", "step-000001.png", "step-000002.png"]
    wide = width(folder / "comparison.png")
    # what is drawn is used again, and drawn anew where other prompts, or more of them, are asked for
    dry = ("run", "pipeline.toml", "--dry-run")
    assert "evaluate sft   evaluated before" in unscored.main(*dry).out
    fewer = unscored.main(*dry, "--set", "eval.samples=2").out
    assert "evaluate sft   on 2 held-out prompts: eval.samples 16 -> 2" in fewer
    other = unscored.main(*dry, "--set", "eval.prompts=['a red sky', 'a blue sea']").out
    assert "evaluate sft   on 2 held-out prompts: the prompts changed" in other
    scored = ("--set", "eval.reward=[{use='bright'}]")
    assert "evaluate base  on 3 held-out prompts: eval.reward" in unscored.main(*dry, *scored).out
    assert unscored.main("run", "pipeline.toml", "--set", "eval.samples=2").status == 0
    assert width(folder / "comparison.png") < wide
    assert unscored.main("run", "pipeline.toml", *scored).status == 0
    assert [row["stage"] for row in json.loads((folder / "results.json").read_text())] == ["base", "sft"]


def test_without_prompts_there_is_a_page_and_no_results_of_before(unscored):
    run(read(unscored.file, ["eval.reward=[{use='bright'}]"]))
    folder = unscored.folder / "runs" / "tiny"
    assert {"results.json", "comparison.png"} <= {path.name for path in folder.iterdir()}
    unscored.write(unscored.text.partition("[eval]")[0].replace("sample_every = 1\n", ""))
    assert unscored.main("run", "pipeline.toml").status == 0
    assert not {"results.json", "comparison.png"} & {path.name for path in folder.iterdir()}
    assert "Held-out results" not in (folder / "report.html").read_text()


def test_the_seed_of_evaluation_is_its_own(unscored, monkeypatch):
    """Another seed of the pipeline trains otherwise, and evaluates on the same noise; its own changes the noise."""
    pictures = []

    def base_samples(*settings: str) -> bytes:
        run(read(unscored.file, [f"name='seed-{len(pictures)}'", *settings]))
        pictures.append((unscored.folder / f"runs/seed-{len(pictures)}/00-base/samples/last.safetensors").read_bytes())
        return pictures[-1]

    monkeypatch.setattr(Run, "_run_stage", lambda self, stage, target, before: before)
    monkeypatch.setattr(Run, "_report", lambda self, targets: None)
    default = base_samples()
    assert base_samples("seed=1") == default
    assert base_samples("eval.seed=1") != default
