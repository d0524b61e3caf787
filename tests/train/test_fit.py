"""The cheapest keys with which a pipeline fits: `corefit check --fit`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import WORDS, Project, fill

from corefit.pipeline.pipeline import Pipeline, read_unchecked
from corefit.testing import tiny_sd3
from corefit.train import remedies
from corefit.train.estimate import Device, Fit, Search, estimates
from corefit.train.estimate import depth as depths
from corefit.train.estimate.search import excess, toml
from corefit.train.remedies import Remedy

MIB = 1 << 20
KEYS = ("data.size=[32,32]", "stage.soar.objective.chunk=2", "stage.soar.micro_batch=4")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose network has blocks enough that recomputing them is worth it; not to be changed by tests."""
    return tiny_sd3(tmp_path_factory.mktemp("deep") / "base", words=WORDS, layers=6)


@pytest.fixture
def large(project: Project, deep: Path) -> Project:
    """A project with that network."""
    (project.folder / "base").unlink()
    (project.folder / "base").symlink_to(deep)
    return project


@pytest.fixture(scope="module")
def anywhere(tmp_path_factory: pytest.TempPathFactory, deep: Path, pictures: Path) -> Fit:
    """What is found for that project on a device that has room for all."""
    return fit(fill(tmp_path_factory.mktemp("large"), deep, pictures), 1e12)


@pytest.fixture(scope="module")
def whole(anywhere: Fit) -> float:
    """The memory that it takes, in bytes."""
    return max(e.peak for e in anywhere.found)


def fit(file: Path, memory: float, world: int = 1, keys: Sequence[str] = KEYS) -> Fit:
    def make(more: Sequence[str]) -> Pipeline:
        return read_unchecked(Pipeline, file, [*keys, *more])

    return Search(make, Device.of(memory), world, room=1.0).fit()


def test_what_fits_as_it_is_needs_no_keys(anywhere: Fit) -> None:
    assert anywhere.fits
    assert not anywhere.chosen
    assert anywhere.before == anywhere.found


@pytest.mark.slow
def test_keys_are_as_many_as_are_needed_and_each_is(large: Project, whole: float) -> None:
    found = fit(large.file, 0.2 * whole)
    assert found.fits
    assert max(e.peak for e in found.found) <= 0.2 * whole < max(e.peak for e in found.before)
    for key in found.chosen:
        others = [each.setting for name, each in found.chosen.items() if name != key]
        pipeline = read_unchecked(Pipeline, large.file, [*KEYS, *others])
        assert excess(estimates(pipeline, Device.of(0.2 * whole)), 0.2 * whole) > 0, f"{key} is not needed"


def test_what_costs_nothing_comes_first(large: Project, whole: float) -> None:
    """A slightly smaller device asks for fewer rows at once, not for another way to train."""
    found = fit(large.file, 0.9 * whole)
    assert {remedies.last_name(key) for key in found.chosen} <= {"micro_batch", "chunk"}


@pytest.mark.slow
def test_more_devices_share_before_another_training_is_proposed(large: Project) -> None:
    keys = [*KEYS, "backbone.train={use='full'}"]
    alone = fit(large.file, 1e12, keys=keys).found
    room = 0.5 * max(e.certain for e in alone)
    found = fit(large.file, room, world=8, keys=keys)
    assert found.fits
    assert "shard" in found.chosen
    assert "backbone.train" not in found.chosen


def test_the_command_prints_keys_that_fit(large: Project, whole: float) -> None:
    set_keys = [part for key in KEYS for part in ("--set", key)]
    ended = large.main("check", "pipeline.toml", *set_keys, "--fit", f"{whole / MIB:.1f}MiB")
    assert ended.status == 0, ended.err
    assert "stay free with these keys:" in ended.out
    lines = dict(re.findall(r"^(micro_batch|objective.chunk|gradient_checkpointing) = (\w+)", ended.out, re.MULTILINE))
    assert lines
    assert "while training" in ended.out
    settings = re.findall(r"--set (\S+)", ended.out)
    again = large.main("check", "pipeline.toml", *set_keys, *(f"--set={each}" for each in settings), "--gpu", "1GiB")
    assert again.status == 0, again.err


@pytest.mark.slow
def test_what_fits_nowhere_is_said(large: Project) -> None:
    ended = large.main("check", "pipeline.toml", "--fit", "0.3MiB")
    assert ended.status == 2
    assert "it does not fit into 0 MiB" in ended.err
    assert re.search(r"stage.soar: training takes \d+ MiB \(weights", ended.err)


def test_what_is_no_number_of_gpus_is_told(project: Project) -> None:
    for said in ("0x24GiB", "manyx24GiB", "8x"):
        ended = project.main("check", "pipeline.toml", "--fit", said)
        assert ended.status == 2
        assert "write" in ended.err
    assert "leave out --gpu" in project.main("check", "pipeline.toml", "--fit", "8x80GiB", "--ranks", "2").err


def test_toml_has_the_keys_under_their_tables() -> None:
    chosen = [Remedy("stage.a.micro_batch", "2"), Remedy("backbone.offload", '"blocks"'), Remedy("shard", "true")]
    lines = list(toml({each.key: each for each in chosen}))
    assert [line.partition("  #")[0] for line in lines] == [
        "shard = true",
        "[backbone]",
        'offload = "blocks"',
        "[[stage]] # a",
        "micro_batch = 2",
    ]


def test_blocks_that_are_left_out_count(large: Project) -> None:
    """Six equal blocks, told by three, take what six take."""
    large.write(large.text.rpartition("[[stage]]")[0])  # of one stage, for estimates of whole networks take seconds
    keys = ["data.size=[32,32]"]
    told = estimates(read_unchecked(Pipeline, large.file, keys), Device.of(1e12))[0].activations
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depths, "LEAST", 100)
        whole = estimates(read_unchecked(Pipeline, large.file, keys), Device.of(1e12))[0].activations
    assert told == pytest.approx(whole, rel=0.005)
