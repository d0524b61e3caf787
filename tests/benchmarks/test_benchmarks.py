"""The benchmarks run, compute what they say, and meet the targets that do not depend on the machine's mood."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import click
import pytest
import quick
import torch
from click.testing import CliRunner

from benchmarks import activations, soar_step, soar_variants, startup, timing
from benchmarks.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("soar_step") / "result.json"
    quick.ready()  # or each of its forks would look through all that pytest has imported
    with quick.uncollected(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "settle", lambda: None)  # it would start pytest anew
        patch.setattr(gc, "freeze", lambda: None)
        done = CliRunner().invoke(main, ["soar_step", "--quick", "--json", str(path)])
    assert done.exit_code == 0, done.output
    assert "activations: soar / sft" in done.stdout
    return json.loads(path.read_text())


def test_it_says_what_was_measured_on_what(result):
    assert result["benchmark"] == "soar_step"
    assert result["quick"] is True
    assert result["machine"]["threads"] == 1
    assert result["machine"]["torch"] == torch.__version__
    assert list(result["variants"]) == ["floor", "soar", "published", "sft", "soar 3", "soar 6", "published, kept"]
    for row in result["variants"].values():
        assert 0 < row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        assert row["activations"] > 0


def test_all_variants_compute_the_same_gradient(result):
    assert set(result["gradients"]) == set(soar_step.SAME)
    assert max(result["gradients"].values()) < 1e-4


def test_a_chunk_of_one_keeps_what_sft_keeps(result):
    ratios = {ratio["name"]: ratio for ratio in result["ratios"]}
    assert ratios["activations: soar / sft"]["measured"]["median"] <= 1.05
    assert ratios["activations: soar / sft"]["met"] is True


def test_more_graphs_at_once_keep_more(result):
    kept = {name: row["activations"] for name, row in result["variants"].items()}
    assert kept["floor"] == pytest.approx(kept["sft"], rel=0.01)
    assert kept["soar 3"] == pytest.approx(3 * kept["soar"], rel=0.05)
    assert kept["soar 6"] == pytest.approx(6 * kept["soar"], rel=0.05)
    assert kept["published, kept"] == pytest.approx(9 * kept["soar"], rel=0.05)


def test_quick_times_are_not_judged(result):
    judged = [ratio["name"] for ratio in result["ratios"] if ratio["met"] is not None]
    assert judged == ["activations: soar / sft"]


def test_the_list_names_every_benchmark():
    shown = CliRunner().invoke(main, [])
    assert shown.exit_code == 0
    for name, command in main.commands.items():
        assert name in shown.stdout
        assert f"python -m benchmarks {name}" in (ROOT / "benchmarks" / "README.md").read_text()
        assert command.help


def test_a_wrong_gradient_is_seen():
    right = [torch.tensor([1.0, -4.0]), torch.tensor([1e-9])]
    assert soar_step.difference(right, right) == 0
    assert soar_step.difference([torch.tensor([1.0, -4.1]), right[1]], right) == pytest.approx(0.025)
    assert soar_step.difference([right[0], torch.tensor([-1e-9])], right) < 1e-4


def test_variants_that_differ_are_not_reported(monkeypatch):
    monkeypatch.setattr(soar_variants, "GUIDANCE", 4.6)  # of what is written plainly; corefit's are built already
    with pytest.raises(click.ClickException, match="soar"):
        soar_step._first_steps(soar_variants.Bench.of(soar_variants.QUICK))


def test_activations_are_what_live_graphs_keep():
    layer = torch.nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8, requires_grad=True)
    with activations.Activations.of(layer).watch() as watched:
        y = layer(x).exp()  # keeps x and exp's result, not the weight
        assert watched.now == 2 * 4 * 8 * 4
        z = (y * y).sum()  # keeps the same storage again
        assert watched.now == 2 * 4 * 8 * 4
        z.backward()
        assert watched.now == 0
        del y, z
    assert watched.peak == 2 * 4 * 8 * 4


def test_a_graph_that_is_dropped_frees_what_it_kept():
    x = torch.randn(16, requires_grad=True)
    watched = activations.Activations(frozenset())
    with watched.watch():
        y = x.sin()
        assert watched.now == 64
        del y
        assert watched.now == 0


def test_resident_memory_grows_by_what_a_run_touches():
    grown = activations.peak_rss(lambda: torch.ones(16 << 20).sum())
    assert grown is None or 60e6 < grown < 90e6


def test_rounds_are_interleaved_and_turned_around():
    order: list[str] = []
    samples = timing.interleaved(["a", "b"], lambda name: lambda: order.append(name), range(3))
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(found) for name, found in samples.items()} == {"a": 3, "b": 3}


def test_ratios_are_taken_within_a_round():
    over, under = ([timing.Sample(s, 0) for s in seconds] for seconds in ((2.0, 20.0, 3.0), (1.0, 10.0, 1.0)))
    assert timing.ratio(over, under) == timing.Spread(median=2.0, low=2.0, high=2.5)


def test_commands_are_timed_until_they_end_or_take_a_step(tmp_path, monkeypatch):
    monkeypatch.setattr(startup, "SETTLED", 0)
    startup._write(tmp_path)
    for name in ("help", "step"):
        sample = startup._waited(startup.WAITS[name], tmp_path)
        assert sample.wall > 0
        assert sample.cpu > 0
    assert (tmp_path / "runs").exists()
    assert not list(tmp_path.glob("runs/*/*/model")), "it ends with the first step"
    (tmp_path / "pipeline.toml").write_text("")
    with pytest.raises(SystemExit, match="backbone is missing"):
        startup._waited(startup.WAITS["check"], tmp_path)
