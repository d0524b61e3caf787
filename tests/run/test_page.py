"""The page of a run's folder as text, of whatever the folder holds. What it does in a browser: test_browser.py."""

from __future__ import annotations

import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_folders import BASE, GRPO, SOAR, Stage, pictures, write_run
from safetensors.numpy import save_file

from corefit.run.report import MetricsLog, Row, Scores, animation, comparison_page, grid, page, results, write_results
from corefit.run.report.page.pictures import size_for
from corefit.run.report.page.verdict import starts_of, verdict
from corefit.run.report.table import Numbers

UNCLOSED = ("meta", "img", "input")


class Reader(HTMLParser):
    """Fails on a tag that is closed out of order; keeps the text, and every address that an element names."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "srcset", "data")]
        if tag not in UNCLOSED:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


def read_page(folder: Path, file: Path | None = None) -> tuple[str, Reader]:
    if file is None:
        page(folder)
    html = (file or folder / "report.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(html)
    assert not reader.open
    reader.text = re.sub(r"\s+", " ", reader.text)
    return html, reader


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "trees")


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "trees"))


# what it says


def test_the_page_of_an_empty_folder_says_so(tmp_path):
    assert "Nothing has been written" in read_page(tmp_path)[1].text


def test_the_page_shows_all_there_is(run):
    html, reader = read_page(run)
    for said in (
        "trees",
        "Finished 2026-11-21 23:40 UTC",
        "NVIDIA H200",
        "5071097",
        "8192 examples",
        "3 of them in the",
    ):
        assert said in reader.text
    assert "stable-diffusion-3.5-medium, 3b4880a69f75" in reader.text
    for heading in ("Held-out results", "Same prompts", "Best and worst", "Samples while", "Training", "Diversity"):
        assert heading in reader.text
    assert "The alarm sounded in stage grpo at step 90" in reader.text
    assert "14.2 Wh" in reader.text
    assert 'class="gain up"' in html
    assert 'class="gain down"' in html
    rows = json.loads((run / "results.json").read_text())
    for metric in ("ocr", "pickscore", "vendi"):
        shown = [row for row in rows if row["metric"] == metric]
        numbers = Numbers.of(shown)
        assert all(part in reader.text for row in shown for part in numbers.value(row))
        assert all(numbers.gain(row)[1] in reader.text for row in shown)


def test_the_page_asks_nothing_from_the_network(run):
    _, reader = read_page(run)
    assert [each for each in reader.addresses if not each.startswith(("data:image/", "#"))] == []


def test_the_page_tells_no_secret_and_no_place(run):
    html, reader = read_page(run)
    assert "0123456789abcdef" not in html
    assert 'api_key = "(not shown)"' in reader.text
    assert "/home/" not in html
    assert str(run.parent) not in html
    assert 'path = "…/sd3"' in reader.text


def test_what_others_wrote_is_escaped(run):
    html, reader = read_page(run)
    assert "two red <b>dog</b>" in reader.text
    assert "<b>dog" not in html
    evil = "</script><script>alert(1)</script>"
    scores = json.loads((run / "01-sft" / "scores.json").read_text())
    scores["prompts"] = [evil for _ in scores["prompts"]]
    (run / "00-base" / "scores.json").write_text(json.dumps(scores))
    assert evil in read_page(run)[1].text
    assert read_page(run)[1].tags.count("script") == 3


def test_the_error_of_a_failed_run_is_told_without_places(run):
    about = json.loads((run / "run.json").read_text())
    about |= {"status": "failed", "error": "/home/ann/secret project/model cannot be read: <no> space in /home/ann/tmp"}
    (run / "run.json").write_text(json.dumps(about))
    html, reader = read_page(run)
    assert "cannot be read: <no> space" in reader.text
    assert "/home/" not in html
    assert "Failed 2026-11-21 23:40 UTC" in reader.text


# what it is made of


def test_a_run_in_its_middle_has_a_page(tmp_path):
    run = write_run(tmp_path / "trees", [BASE, SOAR, Stage("grpo", 0.7, 20, "soar", 120, 64)], "running")
    html, reader = read_page(run)
    assert "Running: training grpo, step 64 of 120; started 2026-11-21 22:10 UTC" in reader.text
    assert 'data-changed="2026-11-21T23:40:00+00:00"' in html
    assert "<progress" in html
    assert "soar gains" in reader.text
    assert "64 of 120" in reader.text
    (run / "results.json").unlink()
    assert "soar gains 20.0 points over base" in read_page(run)[1].text, "its scores are there"


def test_a_run_that_evaluated_its_base_alone(tmp_path):
    run = write_run(tmp_path / "trees", [BASE, Stage("soar", 0.7, 20, "base", 120, 8)], "running")
    assert "base scores 35.8 %, 95 % interval" in read_page(run)[1].text
    assert "no stage has been evaluated yet" in read_page(run)[1].text


def test_a_run_without_evaluation_has_its_curves_and_costs(run):
    for name in ("results.json", "*/scores.json", "*/samples/last.safetensors"):
        for file in run.glob(name):
            file.unlink()
    _, reader = read_page(run)
    assert "Training" in reader.text
    assert "Costs" in reader.text
    assert "Held-out results" not in reader.text


def test_a_folder_of_version_0_1(tmp_path):
    """It has no run.json, no prompts in scores.json, and neither starts nor units in results.json."""
    run = write_run(tmp_path / "old", [BASE, SOAR, GRPO])
    (run / "run.json").unlink()
    rows = json.loads((run / "results.json").read_text())
    for row in rows:
        for key in ("start", "unit", "base_gain", "base_gain_low", "base_gain_high"):
            row.pop(key, None)
    (run / "results.json").write_text(json.dumps(rows))
    for file in run.glob("*/scores.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"prompts": None}))
    for stage in ("01-soar", "02-grpo"):
        cost = {"seconds": 171.0, "samples_per_second": 233.2, "peak_memory": 1 << 30, "survived": None}
        (run / stage / "done.json").write_text(json.dumps({"finished": True, "cost": cost}))
    _, reader = read_page(run)
    assert "soar gains 20.0 points over base" in reader.text
    assert "grpo a further" in reader.text
    assert "prompt 1" in reader.text
    assert "2m 51s" in reader.text


@pytest.mark.parametrize("content", [b"", b"\xff{", b'{"stages": 3, "values": 4}'])
def test_a_damaged_file_is_as_if_it_were_not_there(run, content):
    files = [path for path in run.rglob("*") if path.is_file() and path.parent.name not in ("01-sft", "02-soar")]
    assert {"run.json", "scores.json", "metrics.jsonl", "last.safetensors", "drift.json"} <= {f.name for f in files}
    for name in {file.name for file in files if file.suffix != ".png"}:
        same = [file for file in files if file.name == name]
        kept = [file.read_bytes() for file in same]
        for file in same:
            file.write_bytes(content)
        assert "trees" in read_page(run)[1].text, name
        for file, data in zip(same, kept, strict=True):
            file.write_bytes(data)
    for file in files:
        file.write_bytes(content)
    read_page(run)


def test_clips_are_strips_and_move(tmp_path):
    samples = tmp_path / "01-soar" / "samples"
    samples.mkdir(parents=True)
    save_file({"media": np.zeros((2, 3, 4, 96, 96), np.uint8)}, samples / "last.safetensors")
    animation(np.random.default_rng(0).random((1, 3, 3, 96, 96)), ["p"], samples / "last.webp")
    html, reader = read_page(tmp_path)
    assert html.count("data:image/webp;base64,") == 1
    assert "prompt 2" in reader.text
    (samples / "last.webp").write_bytes((samples / "last.webp").read_bytes() + bytes(4 << 20))
    assert "data:image/webp" not in read_page(tmp_path)[0]


def test_the_best_and_worst_of_all_prompts_are_among_the_pictures(run):
    assert "Of the first 12 held-out prompts" in read_page(run)[1].text
    file = run / "03-grpo" / "samples" / "extremes.safetensors"
    save_file({"media": pictures(2, 48, 1.0)}, file, metadata={"rows": "[100, 200]"})
    html, reader = read_page(run)
    assert "Of all 240 held-out prompts" in reader.text
    data = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])
    assert {"100", "200"} < data["pictures"]["/03-grpo"].keys()
    scores = json.loads((run / "03-grpo" / "scores.json").read_text())
    assert data["prompts"]["200"] == scores["prompts"][200]
    assert data["scores"]["pickscore"]["/03-grpo"]["200"] == scores["values"]["pickscore"][200]
    assert html.count('class="tile"') == 12, "the comparison has the prompts that all stages have"


def test_a_grid_says_of_how_many_steps_its_step_is(run):
    data = json.loads(re.search(r'id="data">(.*?)</script>', read_page(run)[0])[1])
    said = {key: sheets[-1]["name"] for key, sheets in data["sheets"].items()}
    assert said
    for key, name in said.items():
        stage = next(s for s in json.loads((run / "run.json").read_text())["stages"] if key.endswith(s["name"]))
        assert re.fullmatch(rf"step \d+ of {stage['steps']}", name)


def test_many_pictures_are_smaller_and_then_fewer():
    assert size_for([16, 16, 16]) == (640, 16)
    assert size_for([16, 24, 24]) == (448, 24)
    assert size_for([]) == (640, 0)
    side, most = size_for([200, 200, 200, 200])
    assert (side, most) == (320, 100)


def test_large_pictures_are_embedded_smaller(tmp_path):
    samples = tmp_path / "01-soar" / "samples"
    media = pictures(2, 900, 0.5)
    grid(media / 255, ["p"] * 2, samples / "step-000001.png")
    save_file({"media": media}, samples / "last.safetensors")
    html, _ = read_page(tmp_path)
    assert len(html) < 0.2 * sum(file.stat().st_size for file in samples.iterdir())


def test_long_runs_have_bounded_pages(tmp_path):
    log = tmp_path / "01-soar" / "metrics.jsonl"
    log.parent.mkdir()
    lines = ({"step": i, "seconds": i, **{f"m{n}": i / 7 for n in range(10)}} for i in range(20_000))
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = log.parent / "samples"
    samples.mkdir()
    for step in range(30):
        Image.effect_noise((300, 300), 50).save(samples / f"step-{step:06}.png")
    html, _ = read_page(tmp_path)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html)[1])
    curves, sheets = data["curves"]["stages"]["/01-soar"], data["sheets"]["/01-soar"]
    assert len(curves["x"]) == len(curves["y"]["m0"]) <= 800
    assert np.allclose(np.array(curves["x"]) / 7, curves["y"]["m0"], rtol=1e-3), "means over the same neighbors"
    assert [sheets[0]["name"], sheets[-1]["name"]] == ["step 0", "step 29"]
    assert len(sheets) == 12
    assert len(html) < 3 << 20


def test_numbers_that_are_not_finite_are_said_and_left_out(tmp_path):
    log = MetricsLog(tmp_path / "01-soar" / "metrics.jsonl")
    for step, loss in enumerate([1.0, float("nan"), 3.0]):
        log.append(step, {"loss": loss, "seconds": step})
    html, reader = read_page(tmp_path)
    assert "1 not finite" in reader.text
    assert '"loss":[1.0,null,3.0]' in html


def test_branches_share_one_time_axis(run):
    data = json.loads(re.search(r'id="data">(.*?)</script>', read_page(run)[0])[1])
    x = {key: (of["x"][0], of["x"][-1]) for key, of in data["curves"]["stages"].items()}
    assert x == {"/01-sft": (1.0, 100.0), "/02-soar": (1.0, 100.0), "/03-grpo": (101.0, 160.0)}
    assert data["curves"]["alarms"] == [[145.0, "grpo"]]


def test_a_page_of_several_runs(run, tmp_path):
    other = write_run(tmp_path / "other", [BASE, Stage("soar", 0.5, 20, "base", 100, 100)])
    comparison_page([("a", run), ("b", other)], tmp_path / "both.html")
    _, reader = read_page(tmp_path, tmp_path / "both.html")
    assert "a and b" in reader.text
    assert "a: soar gains 20.0 points over a: base" in reader.text
    assert "b: soar gains" in reader.text
    assert reader.text.count("pipeline.toml, with paths") == 2
    rows = [Row(stage="b: soar", metric="joint", category="all", value=0.5, low=0.4, high=0.6, n=9)]
    comparison_page([("a", run), ("b", other)], tmp_path / "both.html", rows)
    _, reader = read_page(tmp_path, tmp_path / "both.html")
    assert "joint" in reader.text
    assert "ocr on" not in reader.text


# what it costs


def test_a_page_that_is_written_again_costs_little(run):
    page(run)
    log = MetricsLog(run / "03-grpo" / "metrics.jsonl")
    seconds: list[float] = []
    for step in range(200, 206):
        log.append(step, {"loss": 1.0, "seconds": 0.5 * step})
        started = time.process_time()
        page(run)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.1
    data = json.loads(re.search(r'id="data">(.*?)</script>', (run / "report.html").read_text())[1])
    assert data["curves"]["stages"]["/03-grpo"]["x"][-1] == 202.5, "what changed is read anew"


def test_scores_newer_than_the_results_count(run):
    """While stages are run anew, results.json is of their former weights."""
    scores = json.loads((run / "03-grpo" / "scores.json").read_text())
    scores["values"]["ocr"] = [1.0 for _ in scores["values"]["ocr"]]
    (run / "03-grpo" / "scores.json").write_text(json.dumps(scores))
    _, reader = read_page(run)
    assert "grpo 100.0 %" in reader.text
    assert "+0.9" in reader.text, "what is no share stays none"


# the verdict


def rows_of(*stages: Scores) -> list[str]:
    rows = results(stages)
    return [re.sub("<.*?>", "", str(each.main)) for each in verdict(rows, starts_of(rows))]


def scores(stage: str, values, start: str = "", unit: str = "share") -> Scores:
    return Scores(stage, {"m": list(values)}, units={"m": unit}, start=start)


HALF = [0.0, 1.0] * 300


def test_the_verdict_of_a_gain_and_a_further_one():
    first, second = [1.0 if i % 10 < 7 else 0.0 for i in range(600)], [1.0 if i % 10 < 9 else 0.0 for i in range(600)]
    [said] = rows_of(scores("base", HALF), scores("soar", first, "base"), scores("grpo", second, "soar"))
    assert re.fullmatch(
        r"soar gains 20\.0 points over base, 95 % interval \d+\.\d to \d+\.\d; "
        r"grpo a further 20\.0 points \(\d+\.\d to \d+\.\d\)\.",
        said,
    )


def test_the_verdict_of_no_sure_gain_says_so():
    [said] = rows_of(scores("base", HALF), scores("soar", [1.0, *HALF[1:]], "base"))
    assert said.startswith("soar shows no sure change from base (+0.2 points, 95 % interval -")


def test_the_verdict_of_a_loss_says_so():
    [said] = rows_of(scores("base", HALF), scores("soar", [0.0] * 600, "base"))
    assert re.fullmatch(r"soar loses 50\.0 points against base, 95 % interval 4\d\.\d to 5\d\.\d\.", said)


def test_the_verdict_of_branches_names_what_each_starts_from():
    more = [1.0 if i % 10 < 7 else 0.0 for i in range(600)]
    [said] = rows_of(scores("base", HALF), scores("sft", more, "base"), scores("soar", more, "base"))
    assert "; soar gains 20.0 points over base (" in said
    assert "further" not in said


def test_the_verdict_of_what_is_no_share_has_no_points():
    draws = np.random.default_rng(0)
    [said] = rows_of(
        scores("base", draws.normal(0.3, 0.1, 600), unit=""),
        scores("soar", draws.normal(0.5, 0.1, 600), "base", unit=""),
    )
    assert "points" not in said
    assert re.match(r"soar gains 0\.\d+ over base", said)


def test_a_stage_named_with_markup_is_escaped():
    rows = results([scores("base", HALF), scores("<i>", [1.0] * 600, "base")])
    assert "<i>" not in str(verdict(rows, starts_of(rows))[0].main)


def test_rows_can_be_written_and_shown_by_themselves(tmp_path):
    write_results(tmp_path / "results.json", results([Scores("<i>", {"<u>": [0.0, 1.0]}, ["<s>", "&lt;"])]))
    _, reader = read_page(tmp_path)
    assert not {"i", "u", "s"} & ({*reader.tags} - {"i"})
    assert all(name in reader.text for name in ("<i>", "<u>", "<s>", "&lt;"))
