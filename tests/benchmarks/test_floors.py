"""The benchmarks against bare loops: both sides compute the same, floors are judged, a wrong side is not reported."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import click
import pytest
from click.testing import CliRunner

from benchmarks import comparing, encode, evaluation, grpo_step, grpo_variants, rollout, scale, subject, trainer
from benchmarks.comparing import Comparison, Floor, Ratio, Side
from benchmarks.timing import Spread


@pytest.fixture(autouse=True)
def _small(checkpoint, monkeypatch):
    """One tiny checkpoint for all of them."""
    monkeypatch.setattr(subject, "tiny_sd3", lambda folder, **_: checkpoint)


@pytest.mark.parametrize("module", [grpo_step, trainer, rollout, evaluation, encode])
def test_every_side_runs_and_those_that_should_agree_do(module, tmp_path):
    made = module.build(tmp_path, True)
    for far, most in made.agrees.values():
        assert far <= most
    for floor in made.floors:
        assert {floor.over, floor.under} <= set(made.sides)
    assert any(floor.target == 1.03 for floor in made.floors)
    for side in made.sides.values():
        side.run()


def test_a_published_step_with_another_loss_is_not_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo_variants, "EPSILON", 10.0)  # of what is written plainly
    with pytest.raises(click.ClickException, match="nothing is reported"):
        comparing.measure("grpo_step", grpo_step.build, 2, True)


def test_the_command_writes_what_it_found(tmp_path):
    def build(folder: Path, quick: bool) -> Comparison:
        sides = {"a": Side("nothing", lambda: None), "b": Side("a little", lambda: sum(range(30_000)))}
        return Comparison(sides=sides, floors=[Floor("b", "a", 1.03)], of="a test", size={"batch": 1}, amount=2)

    file = tmp_path / "result.json"
    done = CliRunner().invoke(comparing.command("x", build, "Help.", 3), ["--quick", "--json", str(file)])
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    assert found["benchmark"] == "x"
    assert found["sides"]["b"]["per_second"] == pytest.approx(2 / found["sides"]["b"]["seconds"]["median"])
    assert [ratio["met"] for ratio in found["ratios"]] == [None], "quick times are not judged"


def test_a_floor_is_met_up_to_its_target():
    ratio = Ratio("b / a", Spread(1.03, 1.0, 1.1), 1.03)
    assert ratio.met is True
    assert attrs.evolve(ratio, target=1.02).met is False
    with pytest.raises(SystemExit):
        comparing.exit_if_missed([attrs.evolve(ratio, target=1.02)], strict=True)


def test_a_line_has_a_slope_and_a_constant():
    line = scale.Line.of("points", [1, 2, 4], [1, 2, 4], [5.0, 8.0, 14.0], judged=True)
    assert (line.slope, line.constant) == (pytest.approx(3), pytest.approx(2))
    assert line.share == pytest.approx(0.4)
    assert line.off == pytest.approx(0)
    assert line.met is True
    square = scale.Line.of("points", [1, 2, 4, 8], [1, 2, 4, 8], [1.0, 4.0, 16.0, 64.0], judged=True)
    assert square.off > 0.3
    assert square.met is False


def test_operations_grow_faster_than_tokens():
    """Attention does, and nothing grows slower but the text."""
    from benchmarks.soar_variants import QUICK

    few, many = (scale._operations(attrs.evolve(QUICK, latents=side)) for side in (8, 32))
    assert 4 < many / few < 256
