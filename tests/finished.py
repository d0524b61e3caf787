"""A finished run to publish: all weights trained, then a LoRA on them, with alpha other than its rank."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import quick

CHANGES = {
    'name = "tiny"': 'name = "tiny"\nprecision = "fp32"',
    'train = { use = "lora", rank = 2 }': "",
    'objective = { use = "soar", points = 2 }': 'objective = { use = "sft" }',
    'name = "grpo"': 'name = "lora"\ntrain = { use = "lora", rank = 2, alpha = 4 }',
    'objective = { use = "flow_grpo", group = 2, steps = 4 }': 'objective = { use = "sft" }',
    'sampler = { use = "flow_sde", noise = 0.7 }\n': "",
    'reward = [{ use = "bright", weight = 1.0 }]\n\n': "\n",
}


def make(file: Path) -> None:
    """Change the pipeline of conftest.py, and run it."""
    from corefit.pipeline import read
    from corefit.run import observers
    from corefit.run.run import run

    text = file.read_text()
    for old, new in CHANGES.items():
        assert old in text, old
        text = text.replace(old, new, 1)
    file.write_text(text)
    with quick.uncollected(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(observers, "curves", quick.blank)
        run(read(file))


def copy(project: Path, folder: Path) -> Path:
    """Copy the project; the run's folder. Files are hard links: they must be replaced and not written to."""
    shutil.copytree(project, folder, symlinks=True, copy_function=os.link)
    return folder / "runs/tiny"
