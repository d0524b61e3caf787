"""The study: its arms are the same everywhere, its prompts are apart, and its page is what its data say."""

from __future__ import annotations

import json
import re
import sys
import time
import tomllib
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import scripts
from diffusers import DiffusionPipeline

from corefit import cli
from corefit.pipeline import read
from corefit.run.evaluation import seeds

HERE = Path(__file__).parents[2] / "examples" / "study"
STARTS = ("under", "saturated", "curated", "curated_lora")
OWN_RATES = {"under": ("sft_items",), "curated": ("sft_items", "reflexflow", "soar_defaults")}


def load(name: str) -> Any:
    return scripts.load(HERE / f"{name}.py")


def pipeline(start: str) -> dict[str, Any]:
    return tomllib.loads((HERE / f"{start}.toml").read_text())


@pytest.mark.parametrize("start", STARTS[1:])
def test_the_arms_differ_in_nothing_but_the_learning_rate(start):
    def arms(name: str) -> list[dict[str, Any]]:
        stages = [each for each in pipeline(name)["stage"] if start == "saturated" or "_then_" not in each["name"]]
        return [{**stage, "optimizer": {**stage["optimizer"], "lr": 0}} for stage in stages]

    def evaluated(name: str) -> dict[str, Any]:
        return {key: value for key, value in pipeline(name)["eval"].items() if key != "reward"}

    assert arms(start) == arms("under")
    assert evaluated(start) == evaluated("under")


@pytest.mark.parametrize("start", STARTS)
def test_pipelines_are_accepted_and_their_bases_are_here(start):
    file = read(HERE / f"{start}.toml")
    base = Path(file.backbone.path)
    assert [stage.name for stage in file.stage] == [stage["name"] for stage in pipeline(start)["stage"]]
    assert DiffusionPipeline.from_pretrained(base).transformer.num_parameters() > 2e6


def test_the_saturated_base_is_that_of_the_digits_but_for_the_transformer():
    ours, theirs = HERE / "base", HERE.parent / "digits" / "base"
    names = sorted(each.relative_to(ours) for each in ours.rglob("*") if each.is_file())
    assert names == sorted(each.relative_to(theirs) for each in theirs.rglob("*") if each.is_file())
    unlike = [str(name) for name in names if (ours / name).read_bytes() != (theirs / name).read_bytes()]
    assert unlike == ["transformer/diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("start", STARTS)
def test_arms_of_a_family_have_its_learning_rate(start):
    """Some arms have a rate that was chosen for them; the page lists them."""
    own = OWN_RATES.get(start, ())
    rates: dict[str, set[float]] = {}
    for stage in pipeline(start)["stage"]:
        name = stage["name"]
        if "_then_" in name:
            continue
        if "soar" in name or name == "matched" or name.endswith("_rate"):
            family = "soar"
        else:
            family = "short" if name in ("sft", "sft_items") else "sft"
        rates.setdefault(name if name in own else family, set()).add(stage["optimizer"]["lr"])
    assert {family: len(found) for family, found in rates.items()} == dict.fromkeys(("soar", "short", "sft", *own), 1)


def test_no_prompt_was_used_before(tmp_path, monkeypatch):
    prompts = load("prompts")
    rows = {
        name: [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]
        for name in ("heldout", "validation")
    }
    used = {json.loads(line)["prompt"] for line in (HERE.parent / "digits" / "heldout.jsonl").read_text().splitlines()}
    scenes = {name: [prompts.Scene.of(row) for row in found] for name, found in rows.items()}
    for name, found in scenes.items():
        assert len({scene.prompt for scene in found}) == len(found), name
        unseen = [scene for scene in found if scene.category in ("two", "position")]
        assert all(scene.held_out and scene.prompt not in used for scene in unseen)
    arranged = [{repr(prompts.arrangement(scene)) for scene in found} for found in scenes.values()]
    singles = {
        repr(prompts.arrangement(scene)) for found in scenes.values() for scene in found if len(scene.things) == 1
    }
    assert arranged[0] & arranged[1] == set() != singles
    monkeypatch.setattr(prompts, "HERE", tmp_path)
    prompts.main()
    for name in rows:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (HERE / f"{name}.jsonl").read_bytes()


@pytest.mark.parametrize(("only", "over"), [("sft", False), ("sft_compute", True), ("", True)])
def test_the_script_compares_with_what_was_run(only, over, tmp_path, monkeypatch):
    study, called = load("study"), []

    def run(words: list[str], **keys: Any) -> SimpleNamespace:
        called.append(words[3:])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(study.subprocess, "run", run)
    chosen = ["--only", only] if only else []
    monkeypatch.setattr(sys, "argv", ["study.py", "--start", "under", *chosen, "--seeds", "2"])
    monkeypatch.setattr(study, "RUNS", tmp_path)
    study.main()
    assert [words[0] for words in called] == ["run", "run", "compare"]
    assert called[1] == ["run", "under.toml", "--set", "seed=1", "--set", "name=under-1", *chosen]
    assert ("--over" in called[2]) is over
    monkeypatch.setattr(study.subprocess, "run", lambda words, **keys: SimpleNamespace(returncode=2))
    with pytest.raises(SystemExit, match="2"):
        study.main()


def test_the_script_runs_an_arm_from_the_starting_points_that_have_it(tmp_path, monkeypatch, capsys):
    study, called = load("study"), []

    def run(words: list[str], **keys: Any) -> SimpleNamespace:
        called.append(words[3:5])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(study.subprocess, "run", run)
    monkeypatch.setattr(study, "RUNS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["study.py", "--only", "soar_n1", "--seeds", "1"])
    study.main()
    assert [words[1] for words in called if words[0] == "run"] == [f"{start}.toml" for start in STARTS]
    called.clear()
    monkeypatch.setattr(sys, "argv", ["study.py", "--only", "sft_then_grpo", "--only", "no_such_arm"])
    with pytest.raises(SystemExit, match="2"):
        study.main()
    assert "no starting point has sft_then_grpo, no_such_arm" in capsys.readouterr().err
    assert called == []


def test_jobs_run_side_by_side_and_stop_where_one_fails(tmp_path, monkeypatch):
    study, together, called = load("study"), Barrier(2, timeout=60), []
    failing = False

    def run(words: list[str], *, stdout: Any, env: dict[str, str], **keys: Any) -> SimpleNamespace:
        called.append(words[3:])
        assert env["OMP_NUM_THREADS"] == "1"
        if words[3] == "compare":
            return SimpleNamespace(returncode=0)
        stdout.write("one of two\n")
        if "seed=0" not in words:
            time.sleep(0.05)
        elif failing:
            return SimpleNamespace(returncode=2)
        else:
            together.wait()
        return SimpleNamespace(returncode=0)

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(study.subprocess, "run", run)
    monkeypatch.setattr(study, "RUNS", tmp_path)
    words = ["study.py", "--start", "under", "--start", "words", "--jobs", "2", "--seeds"]
    monkeypatch.setattr(sys, "argv", [*words, "1"])
    study.main()
    assert sorted(each[0] for each in called) == ["compare", "compare", "run", "run"]
    logs = [tmp_path / "logs" / f"{name}.log" for name in ("under-0", "words-0")]
    assert [log.read_text() for log in logs] == ["one of two\n"] * 2
    monkeypatch.setattr(sys, "argv", [*words, "9"])
    called.clear()
    failing = True
    with pytest.raises(SystemExit, match="2"):
        study.main()
    assert len(called) < 12
    assert all(each[0] == "run" for each in called)


def test_a_gain_is_bold_where_its_interval_excludes_0_before_it_is_rounded():
    tables = load("tables")

    def cell(low: float, high: float) -> str:
        return tables.gain({"unit": "share", "gain": -0.013, "gain_low": low, "gain_high": high}, "gain")

    assert cell(-0.026, -0.0001) == "**-1.3 [-2.6, -0.0]**"
    assert cell(-0.026, 0.0001) == "-1.3 [-2.6, +0.0]"


def verdict() -> str:
    return (HERE / "README.md").read_text().partition("## Verdict")[2].partition("\n## ")[0]


def test_the_page_has_what_its_data_say(monkeypatch, capsys):
    tables, page = load("tables"), (HERE / "README.md").read_text()

    def run(words: list[str], *, cwd: Path, **keys: Any) -> None:
        """Run corefit in this process; it draws and prints nothing, for that would take most of the time."""
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", words[2:])
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.main()

    monkeypatch.setattr(tables.subprocess, "run", run)
    for place, name in (
        (seeds, "forest"),
        (seeds, "drift_curves"),
        (seeds.report, "print_table"),
        (seeds.seeds_table, "print_pairs"),
    ):
        monkeypatch.setattr(place, name, lambda *anything: None)
    assert tables.filled(page) == page, "run python tables.py"
    named = set(re.findall(r"^\| `([A-Za-z]\..+?)` \|", page, re.M))
    cited = set(re.findall(r"`([A-Za-z]\..+?)`", verdict()))
    assert cited
    assert cited <= named, "the verdict cites rows that are there"


def test_every_sentence_of_the_verdict_points_at_a_row():
    paragraphs = [" ".join(each.split()) for each in verdict().strip().split("\n\n")]
    sentences = [each for text in paragraphs for each in re.split(r"(?<=[.)])\s+(?=[A-Z])", text) if each]
    assert sentences
    assert [each for each in sentences if not re.search(r"`[A-Za-z]\.", each)] == []


def test_numbers_of_the_verdict_are_those_of_the_tables():
    """Every "number [low, high]" of the verdict is in a row that its sentence cites."""
    page = (HERE / "README.md").read_text()
    rows = {found[1]: found[0] for found in re.finditer(r"^\| `([A-Za-z]\..+?)` \|.*$", page, re.M)}
    text = " ".join(verdict().split())
    for sentence in re.split(r"(?<=[.)])\s+(?=[A-Z])", text):
        cited = " ".join(rows[name] for name in re.findall(r"`([A-Za-z]\..+?)`", sentence))
        for number in re.findall(r"[+-]\d+\.\d+ \[[^]]+\]", sentence):
            assert number in cited, sentence


def test_the_front_page_says_what_the_study_says():
    """Its differences are those of the study's page, and its shares are in the same rows."""
    page, front = (HERE / "README.md").read_text(), (HERE.parents[1] / "README.md").read_text()
    section = front.partition("**[What does SOAR buy?]")[2].partition("The other objectives have")[0]
    found = re.findall(r"\| ([\d.]+) % \| ([\d.]+) % \| ([+-].+) \|$", section, re.M)
    assert len(found) > 4
    for soar, sft, difference in found:
        [row] = [
            line for line in page.splitlines() if difference in line and line.startswith("| `") and ".soar`" in line
        ]
        assert f"| {soar} [" in row
        letter = row[3]
        assert re.search(rf"^\| `{letter}\.sft_compute` \| \d \| {re.escape(sft)} \[", page, re.M)
