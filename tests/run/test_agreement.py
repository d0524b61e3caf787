"""Ranks that differ are refused, with rank and key; paths, which may differ between machines, are not compared."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attrs import define

from corefit.errors import ConfigError
from corefit.pipeline import read
from corefit.run import agreement
from corefit.system.ranks import Ranks


@define(eq=False)
class Rank(Ranks):
    """One of two processes, without the other: `others` are the facts that it would hear."""

    others: tuple[Mapping[str, str], ...] = ()

    def all_gather_object(self, value: Any) -> list[Any]:
        return [*self.others, value]


def rank(*others: Mapping[str, str], precision: str = "no") -> Rank:
    made: Any = SimpleNamespace(num_processes=2, mixed_precision=precision, device=torch.device("cpu"))
    return Rank(world=2, joined=made, others=others)


def facts(folder: Path, *settings: str, precision: str = "no", command: str = "run") -> Mapping[str, str]:
    pipeline = read(folder / "pipeline.toml", settings)
    return dict(agreement._facts(rank(precision=precision), pipeline, command))


def refused(first: Mapping[str, str], second: Mapping[str, str]) -> str:
    with pytest.raises(ConfigError) as caught:
        agreement.refuse_differences(rank(first), second)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["seed=1"], "rank 1 has seed = 1, rank 0 has 0: all processes of a run must"),
        (["stage.soar.optimizer.lr=5e-4"], "rank 1 has stage.soar.optimizer.lr = 0.0005, rank 0 has 0.001: "),
        (["eval.reward.bright.gain=2.0"], "rank 1 has eval.reward.bright.gain = 2.0, rank 0 has 1.0: "),
        (["stage.soar.ema=0.9"], "rank 1 has stage.soar.ema = 0.9, rank 0 has nothing: "),
        (["name='other'"], "rank 1 has name = other, rank 0 has tiny: "),
    ],
)
def test_another_pipeline_is_refused(project, settings, said):
    assert refused(facts(project.folder), facts(project.folder, *settings)).startswith(said)


def test_another_launch_is_refused(project):
    same = facts(project.folder)
    assert "rank 1 has arithmetic = bf16, rank 0 has no" in refused(same, facts(project.folder, precision="bf16"))
    assert "rank 1 has command = prepare, rank 0 has run" in refused(same, facts(project.folder, command="prepare"))


def test_other_code_and_versions_are_refused(project, monkeypatch):
    former = facts(project.folder)
    (project.folder / "bright.py").write_text((project.folder / "bright.py").read_text() + "# mended\n")
    said = refused(former, facts(project.folder))
    assert said.startswith("rank 1 has code of bright.py = ")
    assert said.count("rank 0 has") == 1
    former = facts(project.folder)
    monkeypatch.setattr("corefit.__version__", "9.9")
    assert refused(former, facts(project.folder)).startswith("rank 1 has corefit = 9.9, rank 0 has ")
    assert {"torch", "diffusers", "transformers", "code of corefit", "code of corefit_soar"} <= former.keys()


def test_stages_in_another_order_are_refused(project):
    first, soar, grpo = project.text.partition("[eval]")[0].split("[[stage]]")
    former = facts(project.folder)
    project.write("[[stage]]".join([first, grpo, soar]) + "[eval]" + project.text.partition("[eval]")[2])
    assert refused(former, facts(project.folder)).startswith("rank 1 has stage = grpo, soar, rank 0 has soar, grpo: ")


def test_a_project_may_lie_elsewhere_on_another_machine(project, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("node") / "project"
    shutil.copytree(project.folder, elsewhere, symlinks=True)
    (elsewhere / "base").rename(elsewhere / "weights")
    there = facts(elsewhere, "out='/scratch/mine'", "backbone.path='weights'")
    agreement.refuse_differences(rank(facts(project.folder)), there)


def test_differences_are_counted_where_there_are_many():
    first, second = {str(n): "a" for n in range(9)}, {str(n): "b" for n in range(9)}
    assert ", rank 1 has 2 = b, rank 0 has a, and 6 more: all" in refused(first, second)
