"""`corefit compare --seeds`: one table of runs that differ in their seed alone, and the same from what is kept."""

from __future__ import annotations

import csv
import gzip
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

import attrs
import numpy as np
import pytest
from seed_folders import STAGES, write_seed, write_seeds

from corefit.cli import main
from corefit.errors import ConfigError, DataError
from corefit.run.evaluation import records, replicates, seeds
from corefit.run.evaluation.records import DATA
from corefit.run.evaluation.seeds import compare_seeds
from corefit.run.folder import write_toml
from corefit.run.report import crossed, intervals
from corefit.run.report.page.memo import Memo
from corefit.system import files
from corefit.system.display import Display

HIDDEN = Display.on(visible=False)
TABLES = ("results.json", "results.csv", "results.md", "drift.json", DATA)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "runs"
    write_seeds(folder)
    return folder


@pytest.fixture
def drawn() -> None:
    """For tests that look at pictures: drawing takes most of the time, and others do without."""


@pytest.fixture(autouse=True)
def _without_pictures(request, monkeypatch):
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(seeds, "forest", lambda rows, png: None)
        monkeypatch.setattr(seeds, "drift_curves", lambda curves, png: None)


@pytest.fixture
def runs(written, tmp_path, monkeypatch) -> Path:
    """The folder of the runs under-0, under-1 and under-2, in the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(written, tmp_path / "runs")
    return Path("runs")


@pytest.fixture
def typed(monkeypatch, capsys):
    """Type a command; return its exit status and all that it said, in lines as long as they are."""

    def typed(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["corefit", "compare", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    return typed


def all_of(runs: Path) -> list[Path]:
    return sorted(runs.iterdir())


def rows_of(folder: Path) -> dict[tuple[str, str, str], dict]:
    found = json.loads((folder / "results.json").read_text())
    return {(row["stage"], row["metric"], row["category"]): row for row in found}


def compared(*places: Path, over: str = "", out: Path = Path("out")) -> dict[tuple[str, str, str], dict]:
    return rows_of(compare_seeds(places, over, out, HIDDEN))


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in TABLES}


def change(file: Path, **changes: object) -> None:
    """Write a JSON file with other contents; a change of a nested table is written like `parts__seed=2`."""
    found = files.read_json(file)
    for path, value in changes.items():
        *outer, key = path.split("__")
        inner = found
        for name in outer:
            inner = inner[name]
        inner[key] = value
    files.write_json(file, found)


def change_pipeline(run: Path, **changes: object) -> None:
    write_toml(run / "pipeline.toml", {**tomllib.loads((run / "pipeline.toml").read_text()), **changes})


def values(runs: Path, stage: str, metric: str = "ocr") -> np.ndarray:
    """Return the values [seeds, prompts] in the folders of the runs."""
    return np.array([files.read_json(run / stage / "scores.json")["values"][metric] for run in all_of(runs)])


# the numbers


def test_a_user_compares_three_seeds(runs, typed, drawn):
    status, said = typed("--seeds", *all_of(runs), "--over", "sft")
    assert status == 0, said
    folder = Path("compare/under").absolute()
    assert said.endswith(f"all of it is in {folder}\n")
    assert "ocr, 48 held-out prompts, 95 % intervals over seeds and prompts" in said
    assert "drift, last level, 5 training examples, 95 % intervals over seeds and prompts" in said
    assert "gains over sft, paired by seed and prompt, 95 % intervals" in said
    assert re.search(r"soar +3 +\d+\.\d %.* base .* 200 +1600 +1m 41s +16\.0 +1024 MiB", said), "seeds and mean costs"
    assert said.count("1024 MiB") == 3, "costs are told once, for each stage that was trained"
    assert sorted(file.name for file in folder.iterdir()) == sorted([*TABLES, "comparison.png", "drift.png"])
    assert {name.stat().st_size > 5000 for name in folder.glob("*.png")} == {True}
    assert not list(runs.rglob("data*")), "nothing is written into a run"


def test_means_and_gains_are_over_seeds_and_prompts(runs):
    rows = compared(*all_of(runs), over="sft")
    soar, sft, base = (values(runs, name) for name in ("02-soar", "01-sft", "00-base"))
    row, clusters = rows["soar", "ocr", "all"], np.arange(48) % 12
    assert (row["value"], row["seeds"], row["n"]) == (pytest.approx(soar.mean()), 3, 48)
    assert row["each"] == pytest.approx({str(seed): found.mean() for seed, found in enumerate(soar)})
    assert (row["low"], row["high"]) == pytest.approx(crossed.of_mean(soar, clusters, "binary"))
    for key, other in (("gain", base), ("base_gain", base), ("over_gain", sft)):
        assert row[key] == pytest.approx((soar - other).mean())
        found = crossed.of_gain(soar - other, clusters, "binary")
        assert (row[f"{key}_low"], row[f"{key}_high"], row[f"{key}_seeds"]) == (*map(pytest.approx, found), 3)
    grpo = values(runs, "03-grpo")
    assert rows["grpo", "ocr", "all"]["gain"] == pytest.approx((grpo - soar).mean())
    assert rows["grpo", "ocr", "all"]["base_gain"] == pytest.approx((grpo - base).mean())
    assert rows["grpo", "ocr", "dogs"]["n"] == 16
    assert row["unit"] == rows["soar", "ocr, 6 steps", "all"]["unit"] == "share"
    assert (rows["soar", "ocr, 6 steps", "all"]["n"], rows["soar", "vendi", "all"]["n"]) == (24, 4)
    assert "over_gain" not in rows["sft", "ocr", "all"], "sft is not compared with itself"


def test_the_base_is_not_trained_and_has_no_seeds(runs):
    row, base = compared(*all_of(runs))["base", "ocr", "all"], values(runs, "00-base")
    assert not {"seeds", "each", "start", "gain", "over"} & row.keys()
    assert (row["low"], row["high"]) == pytest.approx(intervals.of_mean(base[0], np.arange(48) % 12, "binary"))


def test_a_base_that_was_scored_in_another_rounding_stays_with_its_run(runs):
    """Another machine may give the base other values; a gain is over that of the same machine."""
    file = runs / "under-1" / "00-base" / "scores.json"
    change(file, values__pick=[value + 3 for value in files.read_json(file)["values"]["pick"]])
    row = compared(*all_of(runs))["soar", "pick", "all"]
    gains = values(runs, "02-soar", "pick") - values(runs, "00-base", "pick")
    assert row["gain"] == pytest.approx(gains.mean(), rel=1e-4)
    assert (row["gain_low"], row["gain_high"]) == pytest.approx(
        crossed.of_gain(gains, np.arange(48) % 12, "unbounded"), rel=1e-3
    )


def test_a_base_that_two_machines_scored_is_that_of_the_first(runs, typed):
    """Kept results and a run of another machine, which has trained another arm with the same seed."""
    for name in ("02-soar", "03-grpo"):
        shutil.rmtree(runs / "under-1" / name)
    first = compared(*all_of(runs), out=Path("kept"))
    shutil.rmtree(runs)
    write_seed(runs / "under-1", 1)
    shutil.rmtree(runs / "under-1" / "01-sft")
    file = runs / "under-1" / "00-base" / "scores.json"
    change(file, values__pick=[value + 1e-3 for value in files.read_json(file)["values"]["pick"]])
    change(file, diversity__values__vendi=[2.5, 2.5, 2.5, 2.5])
    status, said = typed("--seeds", "kept", runs / "under-1", "--out", "out")
    assert status == 0, said
    line = "under-1/00-base has other values of pick and 1 other metric than kept/data.json.gz, as another machine or"
    assert said.count(line) == 1
    rows = rows_of(Path("out"))
    assert rows["base", "pick", "all"] == first["base", "pick", "all"]
    assert (first["soar", "pick", "all"]["seeds"], rows["soar", "pick", "all"]["seeds"]) == (2, 3)


def test_drift_is_a_mean_over_levels_a_last_level_and_a_curve(runs):
    rows = compared(*all_of(runs))
    measured = [
        [np.array(files.read_json(run / stage / "scores.json")["drift"]["values"]) for run in all_of(runs)]
        for stage in ("02-soar", "00-base")
    ]
    soar, base = map(np.stack, measured)
    row = rows["soar", "drift", "all"]
    assert (row["value"], row["of"], row["n"]) == (pytest.approx(soar.mean(), rel=1e-5), "training examples", 5)
    assert rows["soar", "drift, last level", "all"]["value"] == pytest.approx(soar[:, :, -1].mean(), rel=1e-5)
    expected = crossed.of_gain((soar - base).mean(2), np.array([0, 1, 2, 2, 3]), "unbounded")
    assert (row["gain_low"], row["gain_high"]) == pytest.approx(expected, rel=1e-3), "examples of one prompt cluster"
    curve = next(c for c in files.read_json(Path("out/drift.json"))["stages"] if c["stage"] == "soar")
    assert (curve["sigmas"], curve["seeds"]) == ([0.75, 0.5, 0.25, 0], 3)
    assert curve["drift"] == pytest.approx(soar.mean((0, 1)), rel=1e-5)
    assert curve["change"] == pytest.approx((soar - base).mean((0, 1)), rel=1e-3)
    assert curve["change_low"][0] < curve["change"][0] < curve["change_high"][0]


def test_the_table_as_csv_and_markdown(runs):
    rows = compared(*all_of(runs), over="sft")
    lines = list(csv.DictReader(Path("out/results.csv").read_text().splitlines()))
    assert len(lines) == len(rows)
    soar = next(line for line in lines if (line["stage"], line["metric"], line["category"]) == ("soar", "ocr", "all"))
    assert float(soar["over_gain"]) == rows["soar", "ocr", "all"]["over_gain"]
    assert (soar["seeds"], "each" in soar) == ("3", False)
    text = Path("out/results.md").read_text()
    head = "| stage | seeds | all | cats | dogs | owls | starts from | gain over it | gain over base | gain over sft |"
    assert text.count(head) == 4, "ocr, pick, vendi and ocr at 6 steps"
    assert "**gains over sft, paired by seed and prompt, 95 % intervals**" in text
    assert "| grpo | 50 | 400 | 1m 41s | 16.0 | 1024 MiB |" in text


# seeds that lack something


def test_a_stage_that_one_run_lacks_has_fewer_seeds(runs, typed):
    shutil.rmtree(runs / "under-2" / "03-grpo")
    (runs / "under-1" / "01-sft" / "scores.json").unlink()
    status, said = typed("--seeds", *all_of(runs), "--over", "sft", "--out", "out")
    assert status == 0, said
    assert f"{runs}/under-2: 1 stage without scores yet: grpo" in said
    assert f"{runs}/under-1: 1 stage without scores yet: sft" in said
    found = {stage: row["seeds"] for (stage, *_), row in rows_of(Path("out")).items() if "seeds" in row}
    assert found == {"sft": 2, "soar": 3, "grpo": 2}
    assert rows_of(Path("out"))["soar", "ocr", "all"]["over_gain_seeds"] == 2
    assert re.search(r"soar +3 .*\n.* to [+-]\d+\.\d, 2 seeds", said), "a gain of fewer seeds says so"


def test_one_seed_has_an_interval_over_prompts_alone_and_the_table_says_so(runs, typed):
    status, said = typed("--seeds", runs / "under-1", "--out", "out")
    assert status == 0
    sentence = "one seed: sft, soar, grpo; these intervals are over prompts alone"
    assert said.count(sentence) == Path("out/results.md").read_text().count(sentence) == 6
    row, one = rows_of(Path("out"))["soar", "ocr", "all"], values(runs, "02-soar")[1]
    assert row["seeds"] == 1
    assert row["low"] == pytest.approx(intervals.of_mean(one, np.arange(48) % 12, "binary")[0])


def test_a_killed_run_counts_as_far_as_it_is(runs, typed):
    """It was killed while soar was evaluated; of another one nothing is evaluated yet."""
    for name in ("under-1", "under-2"):
        for place in ("02-soar", "03-grpo"):
            (runs / name / place / "scores.json").unlink()
    (runs / "under-1" / "02-soar" / "scores.partial").mkdir()
    (runs / "under-1" / "results.json").unlink()
    (runs / "under-2" / "00-base" / ".scores.json.part").write_bytes(b"{")
    (runs / "under-2" / "00-base" / "scores.json").unlink()
    status, said = typed("--seeds", *all_of(runs), "--out", "out")
    assert status == 0, said
    assert f"{runs}/under-1: 2 stages without scores yet: soar, grpo" in said
    assert f"{runs}/under-2: 4 stages without scores yet: base, sft, soar, grpo" in said
    rows = rows_of(Path("out"))
    assert {stage: rows[stage, "ocr", "all"].get("seeds") for stage in ("base", *STAGES)} == {
        "base": None,
        "sft": 2,
        "soar": 1,
        "grpo": 1,
    }
    (runs / "under-0" / "00-base" / "scores.json").unlink()
    (runs / "under-1" / "00-base" / "scores.json").unlink()
    status, said = typed("--seeds", *all_of(runs), "--out", "out")
    assert status == 2
    assert "nothing is evaluated yet in runs/under-0, runs/under-1, runs/under-2" in said


def test_stages_of_a_former_seed_or_from_a_former_stage_are_left_out(runs, typed):
    """The run goes on with another seed: its first stage is trained anew, the later ones are still the former."""
    change(runs / "under-2" / "02-soar" / "done.json", identity="new")
    change_pipeline(runs / "under-1", seed=7)
    for stage in ("01-sft", "02-soar"):
        change(runs / "under-1" / stage / "done.json", parts__seed=7)
    status, said = typed("--seeds", *all_of(runs), "--out", "out")
    assert status == 0, said
    assert "under-2/03-grpo is left out: stage soar, which it starts from, was trained anew" in said
    assert "under-1/03-grpo is left out: it was trained with seed 1, and the run's is 7 now" in said
    assert rows_of(Path("out"))["grpo", "ocr", "all"]["seeds"] == 1


def test_a_metric_that_some_lack_has_fewer_seeds_and_is_named(runs, typed):
    """A reward was added, and only the first run has been evaluated by it."""
    for run in all_of(runs)[1:]:
        for file in run.glob("*/scores.json"):
            change(file, values={"ocr": files.read_json(file)["values"]["ocr"]})
    status, said = typed("--seeds", *all_of(runs), "--out", "out")
    assert status == 0, said
    assert "metric pick is there in 4 of 12 evaluations; run the others again" in said
    rows = rows_of(Path("out"))
    assert (rows["soar", "pick", "all"]["seeds"], rows["soar", "ocr", "all"]["seeds"]) == (1, 3)
    (runs / "under-0" / "01-sft" / "scores.json").unlink()
    assert ("sft", "pick", "all") not in compared(*all_of(runs))
    assert ("sft", "ocr", "all") in compared(*all_of(runs))


def test_a_metric_that_was_measured_otherwise_is_left_out(runs, typed):
    for file in (runs / "under-1").glob("*/scores.json"):
        change(file, also={**files.read_json(file)["also"], "rows": [*range(1, 48, 2)]})
        change(file, drift={**files.read_json(file)["drift"], "sigmas": [0.8, 0.5, 0.25, 0.0]})
    status, said = typed("--seeds", *all_of(runs), "--out", "out")
    assert status == 0, said
    assert (
        "metric ocr, 6 steps is left out: its keys differ between runs/under-0/00-base and runs/under-1/00-base" in said
    )
    assert "drift is left out: runs/under-1/00-base and runs/under-0/00-base measured other examples" in said
    assert {metric for _, metric, _ in rows_of(Path("out"))} == {"ocr", "pick", "vendi"}
    assert not Path("out/drift.json").exists()
    kept = json.loads(gzip.decompress(Path("out", DATA).read_bytes()))
    assert not any(each["drift"] or each["also"] for stage in kept["stages"] for each in stage["seeds"])


# what are no replicates


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parts__stage__steps": 250}, r"steps 200 -> 250; runs with several seeds may differ in the seed alone"),
        ({"parts__stage__objective__use": "sft"}, r"objective"),
        ({"parts__train__use": "lora"}, r"train"),
        ({"parts__dataset": "e"}, "its data changed"),
        ({"parts__precision": "bf16"}, "precision fp32 -> bf16"),
    ],
)
def test_a_stage_with_other_settings_is_refused(runs, changes, says):
    change(runs / "under-1" / "02-soar" / "done.json", **changes)
    pattern = f"^stage soar of seed 1 in runs/under-1/02-soar is not that of seed 0 in runs/under-0/02-soar: .*{says}"
    with pytest.raises(ConfigError, match=pattern):
        compared(*all_of(runs))


def test_a_stage_that_starts_elsewhere_is_refused(runs):
    entries = tomllib.loads((runs / "under-1" / "pipeline.toml").read_text())["stage"]
    entries[2]["from"] = "sft"
    change_pipeline(runs / "under-1", stage=entries)
    change(runs / "under-1" / "03-grpo" / "done.json", parts__before={"stage": "sft", "identity": "sft1"})
    with pytest.raises(ConfigError, match="it starts from sft, not soar"):
        compared(*all_of(runs))


def test_without_done_json_pipeline_toml_tells_the_settings(runs):
    for run in all_of(runs):
        for file in run.glob("*/done.json"):
            file.unlink()
    assert compared(*all_of(runs))["soar", "ocr", "all"]["seeds"] == 3, "log_every and chunk differ, and do not count"
    entries = tomllib.loads((runs / "under-1" / "pipeline.toml").read_text())["stage"]
    entries[1]["steps"] = 111
    change_pipeline(runs / "under-1", stage=entries)
    with pytest.raises(ConfigError, match=r"stage soar of seed 1 .*steps 200 -> 111"):
        compared(*all_of(runs))


def test_another_base_is_refused_and_other_code_is_said(runs, typed):
    for stage in ("01-sft", "02-soar"):
        before = files.read_json(runs / "under-1" / stage / "done.json")["parts"]["before"]
        change(runs / "under-1" / stage / "done.json", parts__before={**before, "code": {"corefit_backbones": "d"}})
        change(runs / "under-1" / stage / "done.json", parts__code__corefit_soar="d")
    change(runs / "under-1" / "00-base" / "scores.json", parts__model="other")
    status, said = typed("--seeds", *all_of(runs), "--out", "out")
    assert status == 0, said
    assert said.count("was trained with other code than") == 1
    assert "runs/under-1/01-sft was trained with other code than runs/under-0/01-sft: corefit_soar" in said
    change(runs / "under-1" / "01-sft" / "done.json", parts__before__weights="x")
    status, said = typed("--seeds", *all_of(runs), "--out", "out")
    assert (status, "runs/under-1 started from another base than runs/under-0" in said) == (2, True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parts__seed": 1}, "was evaluated with seed 1, .* with seed 0"),
        ({"prompts": ["another"] * 48}, "was evaluated on other held-out prompts"),
        ({"categories": ["one"] * 48}, "has other categories"),
        ({"parts__eval__guidance": 1.0}, "was not evaluated as .* was: eval.guidance 3.5 -> 1.0; give both the same"),
    ],
)
def test_another_evaluation_is_refused(runs, changes, says):
    for file in (runs / "under-2").glob("*/scores.json"):
        change(file, **changes)
    with pytest.raises(ConfigError, match=says):
        compared(*all_of(runs))


def test_one_seed_twice(runs, typed):
    """Equal runs are one; two that trained the same seed and came to other results are refused by name."""
    shutil.copytree(runs / "under-1", runs / "again")
    assert compared(*all_of(runs))["soar", "ocr", "all"]["seeds"] == 3
    scores = files.read_json(runs / "again" / "02-soar" / "scores.json")["values"]
    change(runs / "again" / "02-soar" / "scores.json", values={**scores, "ocr": scores["ocr"][::-1]})
    status, said = typed("--seeds", *all_of(runs), "--out", "out")
    assert status == 2
    assert (
        "runs/again/02-soar and runs/under-1/02-soar both have stage soar of seed 1, with different values of ocr"
        in said
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--seeds", "runs/under-0", "--over", "sof"], "--over sof: no run has a stage 'sof' (did you mean 'sft'?)"),
        (["runs/under-0", "runs/under-1", "--over", "sft"], "--over goes with --seeds"),
        (["--seeds", "runs/none"], "runs/none is not the folder of a run, such as runs/NAME, nor one that"),
        (["--seeds", "runs/under-0/01-sft"], "runs/under-0/01-sft is one stage; --seeds compares whole runs, such as"),
        (["--seeds", "runs/under-0", "--out", "runs/under-1"], "runs/under-1 is the folder of a run"),
        (["--seeds"], "Missing argument"),
    ],
)
def test_a_wrong_command_is_answered_in_a_sentence(runs, typed, words, says):
    status, said = typed(*words)
    assert (status, says in said) == (2, True), said


def test_a_run_without_a_seed_is_refused(runs, typed):
    (runs / "under-0" / "pipeline.toml").write_bytes(b"\xff")
    status, said = typed("--seeds", *all_of(runs))
    assert (status, "runs/under-0 has no pipeline.toml that can be read, and so no seed" in said) == (2, True)


def test_damaged_scores_are_refused(runs, typed):
    (runs / "under-0" / "02-soar" / "scores.json").write_bytes(b"{")
    status, said = typed("--seeds", *all_of(runs))
    assert (status, "runs/under-0/02-soar: its scores.json is damaged" in said) == (2, True)


# what is kept


def test_what_is_kept_gives_the_same_bytes_without_the_runs(runs, typed):
    compared(*all_of(runs), over="sft")
    before = content(Path("out"))
    assert before[DATA][4:8] == bytes(4), "no time is in it"
    digits = re.findall(r"[\[,:](-?\d+\.\d+)", gzip.decompress(before[DATA]).decode())
    assert len(digits) > 500
    assert max(len(number.strip("-0").replace(".", "").lstrip("0")) for number in digits) == 6
    shutil.rmtree(runs)
    for name in TABLES[:-1]:
        Path("out", name).unlink()
    status, said = typed("--seeds", "out", "--over", "sft")
    assert (status, said.endswith("all of it is in out\n")) == (0, True), said
    assert content(Path("out")) == before


def test_nights_are_merged_in_any_order(runs):
    whole = compared(*all_of(runs))
    expected = content(Path("out"))
    shutil.rmtree(runs / "under-2" / "03-grpo")
    compared(*all_of(runs)[:2], out=Path("first"))
    compared(*all_of(runs)[2:], out=Path("second"))
    shutil.rmtree(runs / "under-2")
    write_seed(runs / "under-2", 2)
    assert compared(Path("second"), Path("first"), *all_of(runs)[1:]) == whole
    assert content(Path("out")) == expected
    with pytest.raises(ConfigError, match="name the folder to write with --out, such as that of first itself"):
        compare_seeds([Path("first"), Path("second")], "", None, HIDDEN)


def test_kept_results_that_differ_from_a_run_are_refused_by_name(runs):
    compared(*all_of(runs))
    change(runs / "under-1" / "02-soar" / "scores.json", values__ocr=[1.0] * 48)
    with pytest.raises(ConfigError, match=f"out/{DATA} and runs/under-1/02-soar both have stage soar of seed 1"):
        compared(Path("out"), runs / "under-1")
    change(runs / "under-1" / "02-soar" / "done.json", parts__stage__steps=7)
    with pytest.raises(ConfigError, match=f"stage soar of seed 1 .* is not that of seed 0 in out/{DATA}: steps"):
        compared(Path("out"), runs / "under-1")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: gzip.compress(b"[]"),
        lambda data: gzip.compress(b"{"),
        lambda data: gzip.compress(gzip.decompress(data).replace(b'"samples":2400', b'"samples":2500')),
    ],
)
def test_damaged_data(runs, damage):
    compared(*all_of(runs))
    file = Path("out", DATA)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=f"out/{DATA} is damaged .*make it again from the runs"):
        compared(Path("out"))


def test_data_of_another_format_are_refused(runs, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(records, "FORMAT", 2)
        compared(*all_of(runs))
    with pytest.raises(DataError, match=r"has format 2, and this version of corefit reads 1"):
        compared(Path("out"))


def test_a_whole_study_is_small(tmp_path):
    """Five seeds of 25 stages on 800 prompts, two rewards and what else is measured, take less than 1 MB."""
    write_seed(tmp_path / "one", 0, each=67)
    (one,) = [replicates.of_run(tmp_path / "one", Memo(), HIDDEN)]
    assert one is not None
    draws, many = np.random.default_rng(0), []
    for stage in range(25):
        for seed in range(5):
            each = one.replicates[1]
            shaken = {
                "ocr": draws.integers(0, 2, 804).tolist(),
                "pick": replicates.rounded((20 + draws.normal(size=804)).tolist()),
            }
            place = attrs.evolve(each.evaluated.files, name=f"stage-{stage}")
            many.append(
                attrs.evolve(each, seed=seed, evaluated=attrs.evolve(each.evaluated, files=place, values=shaken))
            )
    records.write(tmp_path, attrs.evolve(one, replicates=many), ["ocr", "pick", "vendi", "ocr, 6 steps"])
    assert (tmp_path / DATA).stat().st_size < 700_000
    assert len(records.read(tmp_path).replicates) == 125


def test_numbers_are_short():
    from corefit.run.evaluation.replicates import rounded

    assert (
        json.dumps(rounded([1.0, 0.0, 0.123456789, 12345678.9, -1e-7 / 3]))
        == "[1, 0, 0.123457, 12345700, -3.33333e-08]"
    )
