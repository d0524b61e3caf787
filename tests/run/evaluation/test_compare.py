"""`corefit compare`: one table, picture and page of several runs, and a refusal where they cannot be compared."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from run_folders import BASE, GRPO, SFT, SOAR, write_run
from safetensors.numpy import save_file

from corefit.cli import main
from corefit.errors import ConfigError, DataError
from corefit.run.evaluation.compare import compare
from corefit.run.report import read_results
from corefit.system import files
from corefit.system.display import Display

CHAIN, BRANCHES = [BASE, SOAR, GRPO], [BASE, SFT, SOAR]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "runs"
    write_run(folder / "a", CHAIN)
    write_run(folder / "b", BRANCHES)
    return folder


@pytest.fixture
def runs(written, tmp_path) -> Path:
    """The folder of the runs a (base, soar, grpo) and b (base, sft and soar, both from the base)."""
    return Path(shutil.copytree(written, tmp_path / "runs"))


@pytest.fixture
def typed(monkeypatch, capsys):
    """Type a command; return its exit status and all that it said."""

    def typed(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["corefit", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    return typed


def change(stage: Path, **changes: object) -> None:
    """Write scores.json with other contents; a change of a nested table is written like `eval__guidance=2`."""
    content = files.read_json(stage / "scores.json")
    for path, value in changes.items():
        *outer, key = path.split("__")
        inner = content if not outer and key in content else content["parts"]
        for name in outer:
            inner = inner[name]
        inner[key] = value
    files.write_json(stage / "scores.json", content)


def change_run(run: Path, **changes: object) -> None:
    for stage in run.glob("0*"):
        change(stage, **changes)


def compared(*places: Path, out: Path | None = None) -> tuple[list[str], list[dict]]:
    """Return the names of the stages, and the rows, of a comparison."""
    rows = read_results(compare(places, out, Display.on(visible=False)) / "results.json")
    return list(dict.fromkeys(row["stage"] for row in rows)), rows


def numbers(rows, stage: str) -> list[dict]:
    return [
        {key: v for key, v in row.items() if key not in ("stage", "start")} for row in rows if row["stage"] == stage
    ]


def test_two_runs_from_one_base(runs, typed):
    status, said = typed("compare", runs / "a", runs / "b")
    folder = runs.parent / "compare" / "a-b"
    assert status == 0, said
    assert said.endswith(f"all of it is in {folder}\n")
    assert "ocr, 240 held-out prompts, 95 % intervals" in said
    assert re.search(r"a: soar +1m 40s +90\.0 +3\.0 GiB", said), "what stages took is said, too"
    names = ["comparison.png", "report.html", "results.csv", "results.json", "results.md"]
    assert sorted(file.name for file in folder.iterdir()) == names
    rows = read_results(folder / "results.json")
    starts = {row["stage"]: row.get("start") for row in rows}
    assert starts == {"base": None, "a: soar": "base", "a: grpo": "a: soar", "b: sft": "base", "b: soar": "base"}
    assert {row["metric"]: row["unit"] for row in rows} == {"ocr": "share", "pickscore": "", "vendi": ""}
    assert len(list((folder / "results.csv").read_text().splitlines())) == len(rows) + 1
    assert "| a: grpo |" in (folder / "results.md").read_text()


def test_every_number_is_that_of_the_run_itself(runs):
    _, rows = compared(runs / "a", runs / "b")
    for run, stages in {"a": CHAIN, "b": BRANCHES}.items():
        own = read_results(runs / run / "results.json")
        for stage in stages:
            name = stage.name if stage is BASE else f"{run}: {stage.name}"
            assert numbers(rows, name) == numbers(own, stage.name)


def test_bases_that_differ_have_each_their_own_gains(runs, typed):
    change(runs / "b" / "00-base", model="other")
    values = files.read_json(runs / "b" / "00-base" / "scores.json")["values"]
    change(runs / "b" / "00-base", values={**values, "ocr": [0.0] * 239 + [1.0]})
    status, said = typed("compare", runs / "a", runs / "b")
    assert status == 0
    assert f"{runs / 'b'} started from another base than {runs / 'a'}; each run's gains are over its own base" in said
    rows = read_results(runs.parent / "compare" / "a-b" / "results.json")
    assert {row["stage"]: row.get("start") for row in rows if row["stage"].startswith("b")} == {
        "b: base": None,
        "b: sft": "b: base",
        "b: soar": "b: base",
    }
    found = {row["stage"]: row for row in rows if (row["metric"], row["category"]) == ("ocr", "all")}
    for name in ("b: sft", "b: soar"):
        assert found[name]["base_gain"] == pytest.approx(found[name]["value"] - found["b: base"]["value"])


def test_the_page_names_the_base_of_each_run(runs):
    """The last stage is of the second run, and starts from another stage."""
    change(runs / "a" / "00-base", model="other")
    html = (compare([runs / "b", runs / "a"], None, Display.on(visible=False)) / "report.html").read_text()
    assert re.search(r"; a: grpo is [\d.]+ points over a: base\.", html)
    assert '<small class="over">over base</small>' in html
    (runs / "a" / "00-base" / "scores.json").write_bytes((runs / "b" / "00-base" / "scores.json").read_bytes())
    html = (compare([runs / "b", runs / "a"], None, Display.on(visible=False)) / "report.html").read_text()
    assert re.search(r"; a: grpo is [\d.]+ points over base\.", html)


def test_a_base_that_was_scored_in_another_rounding_stays_with_its_run(runs, typed):
    values = files.read_json(runs / "b" / "00-base" / "scores.json")["values"]
    change(runs / "b" / "00-base", values={**values, "pickscore": [v + 1e-6 for v in values["pickscore"]]})
    _, said = typed("compare", runs / "a", runs / "b")
    assert "was scored in another rounding" in said
    assert "b: base" in said


def test_a_stage_comes_with_what_it_comes_from(runs):
    assert compared(runs / "b" / "01-sft", runs / "a" / "02-grpo")[0] == ["base", "b: sft", "a: soar", "a: grpo"]
    assert (runs.parent / "compare" / "b-01-sft-a-02-grpo").is_dir()


def test_stages_of_one_run_keep_their_names(runs):
    names, rows = compared(runs / "b" / "02-soar", runs / "b" / "01-sft")
    assert names == ["base", "sft", "soar"]
    assert rows == read_results(runs / "b" / "results.json")


def test_the_page_shows_what_is_compared_and_nothing_else(runs):
    folder = compare([runs / "b" / "01-sft", runs / "a" / "01-soar"], runs / "out", Display.on(visible=False))
    html = (folder / "report.html").read_text()
    labels = {stage["label"] for stage in json.loads(html.split('id="data">')[1].split("</script>")[0])["stages"]}
    assert labels == {"base", "b: sft", "a: soar"}
    assert "<title>b and a</title>" in html


def test_labels_are_the_shortest_that_tell_runs_apart(runs):
    shutil.copytree(runs / "a", runs / "more" / "a")
    names, _ = compared(runs / "a", runs / "more" / "a", runs / "b")
    assert names == [
        "base",
        *("runs/a: soar", "runs/a: grpo", "more/a: soar", "more/a: grpo"),
        *("b: sft", "b: soar"),
    ]
    assert (runs.parent / "compare" / "runs-a-more-a-b").is_dir()


def test_a_stage_that_the_pipeline_has_no_longer_is_left_out(runs):
    shutil.copytree(runs / "b" / "02-soar", runs / "b" / "02-former")
    assert compared(runs / "a", runs / "b")[0] == ["base", "a: soar", "a: grpo", "b: sft", "b: soar"]


def test_again_gives_the_same_files(runs):
    def content(folder: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "report.html"}

    folder = compare([runs / "a", runs / "b"], None, Display.on(visible=False))
    before = content(folder)
    assert content(compare([runs / "a", runs / "b"], None, Display.on(visible=False))) == before


# what is not comparable


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 1}, "was evaluated with seed 1, .* with seed 0; set eval.seed = 0 and run it again, which evaluates"),
        ({"prompts": ["another"] * 240}, "was evaluated on other held-out prompts"),
        ({"categories": ["one"] * 240}, "has other categories of its prompts"),
        (
            {"categories": ["one"] * 9, "prompts": ["x"] * 9, "values": {"ocr": [1.0] * 9}},
            "was evaluated on 9 held-out prompts, .*a/00-base on 240; give both the same eval.limit",
        ),
    ],
)
def test_other_prompts_or_noise_are_refused(runs, changes, says):
    change_run(runs / "b", **changes)
    with pytest.raises(ConfigError, match=f"b/0.-[a-z]* {says}"):
        compared(runs / "a", runs / "b")


def test_one_stage_that_was_evaluated_otherwise_is_enough(runs):
    change(runs / "a" / "02-grpo", seed=5)
    with pytest.raises(ConfigError, match="a/02-grpo was evaluated with seed 5"):
        compared(runs / "a", runs / "b")


def test_another_size_is_refused(runs):
    file = runs / "b" / "01-sft" / "samples" / "last.safetensors"
    save_file({"media": np.zeros((12, 3, 32, 64), np.uint8)}, file)
    with pytest.raises(ConfigError, match=r"01-sft was evaluated in size 32x64, .*00-base in size 48x48"):
        compared(runs / "a", runs / "b")


def test_files_of_version_0_1_know_their_prompts_by_a_hash(runs):
    """Neither prompts nor units were written."""
    for run in ("a", "b"):
        change_run(runs / run, prompts=[])
        rows = [{k: v for k, v in row.items() if k != "unit"} for row in read_results(runs / run / "results.json")]
        (runs / run / "results.json").write_text(json.dumps(rows))
    names, rows = compared(runs / "a", runs / "b")
    assert len(names) == 5
    assert not any("unit" in row for row in rows)
    for stage in (runs / "b").glob("0*"):
        content = files.read_json(stage / "scores.json")
        files.write_json(stage / "scores.json", {**content, "parts": {**content["parts"], "prompts": "other"}})
    with pytest.raises(ConfigError, match="other held-out prompts"):
        compared(runs / "a", runs / "b")


def test_other_settings_of_sampling_are_said_once(runs, typed):
    change_run(runs / "b", eval__guidance=2.0)
    status, said = typed("compare", runs / "a", runs / "b")
    assert status == 0
    assert said.count("eval.guidance 4.5 -> 2.0") == 1
    assert "was evaluated otherwise than that of" in said
    assert "b: base" in said


def test_a_metric_that_one_lacks_or_measures_otherwise_is_left_out(runs, typed):
    change_run(runs / "b", eval__diversity={"prompts": 3, "samples": 2, "features": "pixels"})
    for stage in (runs / "b").glob("0*"):
        values = files.read_json(stage / "scores.json")["values"]
        change(stage, values={"ocr": values["ocr"]}, eval__reward=[{"use": "ocr", "weight": 2.0}])
    status, said = typed("compare", runs / "a", runs / "b")
    assert status == 0
    assert f"metric pickscore is left out: {runs / 'b' / '00-base'} was not scored by it" in said
    assert "metric vendi is left out: its keys differ" in said
    assert {row["metric"] for row in read_results(runs.parent / "compare" / "a-b" / "results.json")} == {"ocr"}


def test_a_reward_at_other_steps_is_a_metric_with_prompts_of_its_own(runs, typed):
    for stage in (*(runs / "a").glob("0*"), *(runs / "b").glob("0*")):
        content = files.read_json(stage / "scores.json")
        more = {"rows": [0, 2], "values": {"ocr, 6 steps": [1.0, 0.0]}}
        files.write_json(stage / "scores.json", {**content, "also": more})
    rows = compared(runs / "a", runs / "b")[1]
    found = [row for row in rows if row["metric"] == "ocr, 6 steps"]
    assert {(row["stage"], row["n"], row["unit"]) for row in found if row["category"] == "all"} == {
        (name, 2, "share") for name in ("base", "a: soar", "a: grpo", "b: sft", "b: soar")
    }
    for stage in (runs / "b").glob("0*"):
        content = files.read_json(stage / "scores.json")
        files.write_json(stage / "scores.json", {**content, "also": {**content["also"], "rows": [0, 3]}})
    status, said = typed("compare", runs / "a", runs / "b")
    assert (status, "metric ocr, 6 steps is left out: its keys differ" in said) == (0, True)


def test_runs_without_rewards_are_compared_by_their_pictures(runs, typed):
    for run in ("a", "b"):
        change_run(runs / run, values={}, diversity={"rows": [], "values": {}}, eval__reward=[])
    status, said = typed("compare", runs / "a", runs / "b")
    assert status == 0, said
    folder = runs.parent / "compare" / "a-b"
    assert read_results(folder / "results.json") == []
    assert (folder / "comparison.png").stat().st_size > 1000
    assert "a: grpo" in (folder / "report.html").read_text()


def test_a_stage_without_its_samples_has_no_picture(runs, typed):
    (runs / "b" / "01-sft" / "samples" / "last.safetensors").write_bytes(b"x")
    _, said = typed("compare", runs / "a", runs / "b")
    assert "b: sft has no picture: " in said
    assert "b: soar has no picture" not in said


# faults


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["a"], "a alone is compared with nothing; name another run, or two of its stages"),
        (["a", "b/../a"], "a alone is compared with nothing"),
        (["a", "none"], "none is not the folder of a run"),
        (["a", "a/01-soar/samples"], "a/01-soar/samples is not the folder of a run"),
        (["a", "b/07-none"], "b/07-none is not the folder of a run"),
        ([], "Missing argument"),
        (["a", "b", "--out", "b"], "b is the folder of a run, which a comparison would overwrite"),
        (["a", "b", "--out", "b/03-new"], "b/03-new is the folder of a run"),
        (["a", "b", "--out", "a/results.json/x"], "a/results.json/x"),
    ],
)
def test_a_wrong_command_is_answered_in_a_sentence(runs, typed, monkeypatch, words, says):
    monkeypatch.chdir(runs)
    before = (runs / "b" / "results.json").read_bytes()
    status, said = typed("compare", *words)
    assert status == 2
    assert says in said
    assert (runs / "b" / "results.json").read_bytes() == before


def test_a_run_in_its_middle(runs, typed, monkeypatch):
    monkeypatch.chdir(runs)
    (runs / "a" / "01-soar" / "scores.json").unlink()
    status, said = typed("compare", "a", "b")
    assert status == 0
    assert "a: soar has no scores yet, and is left out" in said
    assert "a: grpo has no scores yet, and is left out" in said, "its gain is over soar"
    status, said = typed("compare", "a/01-soar", "b")
    assert (status, said) == (2, "error: a/01-soar has no scores; compare it after a run with [eval]\n")
    (runs / "a" / "00-base" / "scores.json").unlink()
    assert typed("compare", "a", "b") == (2, "error: a/00-base has no scores; compare it after a run with [eval]\n")
    shutil.rmtree(runs / "a" / "00-base")
    assert typed("compare", "a", "b")[0] == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"values": {}}', b"\xff"])
def test_damaged_scores(runs, damage, typed, monkeypatch):
    monkeypatch.chdir(runs)
    (runs / "b" / "01-sft" / "scores.json").write_bytes(damage)
    status, said = typed("compare", "a", "b")
    assert status == 2
    assert "b/01-sft: its scores.json is damaged" in said
    assert "run its pipeline again, which evaluates it anew" in said


def test_one_number_too_few(runs):
    values = files.read_json(runs / "b" / "01-sft" / "scores.json")["values"]
    change(runs / "b" / "01-sft", values={**values, "ocr": values["ocr"][1:]})
    with pytest.raises(DataError, match="values of different numbers of prompts"):
        compared(runs / "a", runs / "b")


def test_names_that_make_no_folder(runs):
    folders = [Path(shutil.copytree(runs / "a", runs / f"{letter * 90}")) for letter in "xy"]
    with pytest.raises(ConfigError, match="name one with --out"):
        compared(*folders)
    assert len(compared(*folders, out=runs / "out")[0]) == 5
