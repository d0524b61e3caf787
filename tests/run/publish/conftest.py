"""A finished run to publish: all weights trained, then a LoRA on them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import quick
from conftest import PIPELINE, fill

CHANGES = {
    'name = "tiny"': 'name = "tiny"\nprecision = "fp32"',
    'train = { use = "lora", rank = 2 }': "",
    'objective = { use = "soar", points = 2 }': 'objective = { use = "sft" }',
    'name = "grpo"': 'name = "lora"\ntrain = { use = "lora", rank = 2, alpha = 4 }',
    'objective = { use = "flow_grpo", group = 2, steps = 4 }': 'objective = { use = "sft" }',
    'sampler = { use = "flow_sde", noise = 0.7 }\n': "",
    'reward = [{ use = "bright", weight = 1.0 }]\n\n': "\n",
}


def pipeline() -> str:
    """The text of its pipeline."""
    text = PIPELINE
    for old, new in CHANGES.items():
        assert old in text, old
        text = text.replace(old, new, 1)
    return text


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, pictures: Path) -> Path:
    """The folder of a project with that run, which took four seconds; tests use copies."""
    from corefit.pipeline import read
    from corefit.run import observers
    from corefit.run.run import run

    folder = tmp_path_factory.mktemp("finished")
    file = fill(folder, checkpoint, pictures)
    file.write_text(pipeline())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observers, "curves", quick.blank)
        run(read(file))
    return folder


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A copy of the project, which may be changed; weights are hard links, which are replaced and not written to."""
    shutil.copytree(finished, tmp_path / "project", symlinks=True, copy_function=os.link)
    return tmp_path / "project"


@pytest.fixture
def run(project: Path) -> Path:
    """The folder of the run in it."""
    return project / "runs/tiny"
