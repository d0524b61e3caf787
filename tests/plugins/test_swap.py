"""One pipeline, SOAR then GRPO, on every family: nothing changes but `use` and `path`."""

from __future__ import annotations

import json

import pytest
from conftest import WORDS, Project
from safetensors.torch import load_file

from corefit.testing import tiny_flux, tiny_wan

MAKE = {"flux": tiny_flux, "wan": tiny_wan}
CLASSES = {"flux": "FluxPipeline", "wan": "WanPipeline"}


@pytest.mark.parametrize("use", MAKE)
def test_the_same_pipeline_runs_on(use: str, project: Project) -> None:
    (project.folder / "base").unlink()
    MAKE[use](project.folder / "base", words=WORDS)
    project.swap(('use = "sd3"', f'use = "{use}"'))
    assert project.main("check", "pipeline.toml").status == 0
    ended = project.main("run", "pipeline.toml", "--set", "precision='fp32'")
    assert ended.status == 0, ended.err
    run = project.folder / "runs" / "tiny"
    rows = json.loads((run / "results.json").read_text())
    assert {row["stage"] for row in rows} == {"base", "soar", "grpo"}
    for stage in ("01-soar", "02-grpo"):
        assert (run / stage / "samples" / "last.png").exists()
        (weights,) = (run / stage / "model").glob("*.safetensors")
        assert all(t.isfinite().all() for t in load_file(weights).values())


def test_wan_trains_on_clips(project: Project) -> None:
    """The same again, but for media and their size."""
    import numpy as np
    from PIL import Image

    (project.folder / "base").unlink()
    tiny_wan(project.folder / "base", words=WORDS, experts=2)
    rows = []
    for n in range(8):
        folder = project.folder / f"clip{n}"
        folder.mkdir()
        for frame in range(5):
            Image.fromarray(np.full((32, 16, 3), 20 * n + 5 * frame, np.uint8)).save(folder / f"{frame}.png")
        rows.append({"media": f"clip{n}", "prompt": "a red sky"})
    (project.folder / "train.jsonl").unlink()
    project.lines("train.jsonl", *rows)
    project.swap(('use = "sd3"', 'use = "wan"'), ("size = [16, 16]", "size = [5, 32, 16]"))
    ended = project.main("run", "pipeline.toml", "--set", "precision='fp32'")
    assert ended.status == 0, ended.err
    run = project.folder / "runs" / "tiny"
    assert len(list((run / "02-grpo" / "model").glob("*.safetensors"))) == 2
    for stage in ("00-base", "01-soar", "02-grpo"):
        assert (run / stage / "samples" / "last.webp").exists()
    assert project.main("show", "pipeline.toml", "--count", "3").status == 0
    assert (run / "data.png").exists()
