"""The `optimizer` table of a stage: what it may say, what is refused, and that old files mean what they meant."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from conftest import Project

from corefit.errors import ConfigError, CorefitError
from corefit.pipeline import read
from corefit.pipeline.pipeline import CHOICES
from corefit.pipeline.reader import Reader
from corefit.run import identity
from corefit.types import AdamW
from corefit_optimizers import AdamW8bit, Muon, eight_bit

KEYS = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 1e-2, "warmup": 0, "schedule": "constant"}


def table(pipeline: Any) -> dict[str, Any]:
    return Reader(pipeline.host, pipeline.folder, CHOICES).tables(pipeline.stage[0])


def determines(project: Project, *settings: str) -> identity.Identity:
    pipeline = read(project.file, settings)
    return identity.of_stage(pipeline, pipeline.stage[0], identity.of_base(pipeline), "data", "fp32")


def test_without_use_it_is_adamw_and_is_written_out_as_before(project: Project) -> None:
    pipeline = read(project.file)
    assert pipeline.stage[0].optimizer == AdamW(lr=1e-3)
    assert table(pipeline)["optimizer"] == KEYS
    assert "copies" not in table(pipeline)


def test_names_change_weights_and_where_copies_lie_does_not(project: Project) -> None:
    before = determines(project)
    assert determines(project, "stage.soar.optimizer.use=adamw") == before
    moved = determines(project, "stage.soar.copies=cpu")
    assert moved.hash == before.hash
    assert moved.rounding_changes(before.rounding) == "copies none -> cpu"
    other = determines(project, "stage.soar.optimizer.use=muon")
    assert other.changes_since(before.parts).startswith("optimizer ")
    assert "corefit_optimizers" in other.parts["code"]


def test_another_is_read_with_keys_of_its_own(project: Project) -> None:
    keys = ["stage.soar.optimizer={use='adamw8bit', lr=1e-4, smallest=64, warmup=2, schedule='cosine'}"]
    found = read(project.file, keys).stage[0].optimizer
    assert found == AdamW8bit(lr=1e-4, smallest=64, warmup=2, schedule="cosine")
    assert [found.rate(step, 2) for step in range(2)] == [5e-5, 1e-4]
    assert read(project.file, ["stage.soar.optimizer.use='muon'"]).stage[0].optimizer == Muon(lr=1e-3)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("stage.soar.optimizer.use='adamw8bits'", "no optimizer is called 'adamw8bits' .did you mean 'adamw8bit'"),
        ("stage.soar.optimizer={use='prodigy', betas=[0.9, 1.0]}", "stage.soar.optimizer.betas.*must be < 1"),
        ("stage.soar.optimizer={use='muon', rank=3}", "stage.soar.optimizer.rank is not a key"),
        ("stage.soar.copies='disk'", "stage.soar.copies: must be one of 'cpu'"),
    ],
)
def test_what_is_wrong_is_named(project: Project, setting: str, said: str) -> None:
    with pytest.raises(CorefitError, match=said):
        read(project.file, [setting])


def test_one_that_needs_whole_weights_is_refused_for_shards(project: Project) -> None:
    said = r"stage.soar.optimizer: muon needs whole weights, .*; use one of adamw, adamw8bit, paged_adamw8bit"
    with pytest.raises(ConfigError, match=said):
        read(project.file, ["stage.soar.optimizer.use='muon'", "shard=true"])
    read(project.file, ["stage.soar.optimizer.use='adamw8bit'", "shard=true"])


def test_a_missing_package_is_named_with_its_extra(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(eight_bit, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    done = project.main("check", "--set", "stage.soar.optimizer.use='paged_adamw8bit'")
    assert done.status == 2
    assert "stage.soar.optimizer: bitsandbytes is not installed; pip install 'corefit[lowbit]'" in done.err
