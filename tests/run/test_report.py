from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from corefit.errors import DataError
from corefit.run.report import (
    MetricsLog,
    Scores,
    animation,
    comparison,
    curves,
    grid,
    print_table,
    read_metrics,
    read_results,
    results,
    visible_frames,
    write_results,
)
from corefit.run.report.intervals import wilson
from corefit.run.report.results import KEYS, Block, blocks_of
from corefit.run.report.sheets import _Text
from corefit.run.report.table import Numbers, direction, duration
from corefit.system.memory import size

GAINS = {"gain", "gain_low", "gain_high"}
BASE_GAINS = {f"base_{key}" for key in GAINS}
SHARE = {"accuracy": "share"}
INTERVAL = {"unit", "low", "high"}
NAMES = ["single", "two", "counting", "colours", "position"]


def draws(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def binary(stage: str, p: float, n: int = 600, **costs: float) -> Scores:
    """Correlated between stages, as paired scores are."""
    hits = (draws(0).random(n) < p).astype(float).tolist()
    return Scores(stage, {"accuracy": hits}, [NAMES[i % 5] for i in range(n)], units=SHARE, **costs)


@pytest.fixture
def stages() -> list[Scores]:
    return chained(
        binary("base", 0.4),
        binary("soar", 0.55, seconds=171.0, samples_per_second=233.2, peak_memory=890 << 20),
        binary("grpo", 0.6, seconds=8120.0, samples_per_second=31.1, peak_memory=3 << 30),
    )


def chained(*stages: Scores) -> list[Scores]:
    """Each starts from the one before."""
    return [stages[0], *(evolve(now, start=before.stage) for before, now in pairwise(stages))]


def printed(stages: list[Scores], width: int = 120) -> str:
    file = io.StringIO()
    print_table(stages, results(stages), Console(file=file, width=width))
    return file.getvalue()


# Rows


def test_rows_have_exactly_the_keys_and_order(stages: list[Scores]):
    rows = results(stages)
    order = [(row["stage"], row["category"]) for row in rows]
    assert order == [(s, c) for s in ("base", "soar", "grpo") for c in ("all", *NAMES)]
    keys = KEYS | INTERVAL
    for row in rows:
        assert row.keys() == (keys if row["stage"] == "base" else keys | {"start"} | GAINS | BASE_GAINS)
        assert row["n"] == (600 if row["category"] == "all" else 120)
        assert row["low"] <= row["value"] <= row["high"]


def test_values_and_gains_are_means_of_the_prompts(stages: list[Scores]):
    base, soar = (np.array(stage.values["accuracy"]) for stage in stages[:2])
    for row in results(stages)[6:12]:
        keep = np.array([row["category"] in ("all", c) for c in stages[0].categories])
        assert row["value"] == pytest.approx(soar[keep].mean())
        assert row["gain"] == pytest.approx((soar - base)[keep].mean())
        assert (row["low"], row["high"]) == wilson(soar[keep].sum(), keep.sum())
        assert row["gain_low"] < row["gain"] < row["gain_high"]


def test_results_are_equal_in_every_call_and_leave_global_randomness_alone(stages: list[Scores]):
    np.random.seed(3)
    expected = np.random.RandomState(3).random()
    assert results(stages) == results(stages)
    assert np.random.random() == expected


def test_gain_of_identical_scores_is_zero(stages: list[Scores]):
    """Its interval is not: what changes once in a thousand pictures was not seen to change in 120."""
    row = results(chained(stages[0], evolve(stages[0], stage="same")))[-1]
    assert row["gain"] == 0
    assert row["n"] == 120
    assert (row["gain_low"], row["gain_high"]) == pytest.approx((-0.031, 0.031), abs=1e-4)  # 3.84 / (n + 3.84)


def test_gains_are_over_what_a_stage_starts_from_and_over_the_base():
    """base -> {b, c -> d}: a constant difference of a metric without bounds has no interval."""
    values = draws(8).normal(0, 10, 50)
    shifts = {"base": (0.0, ""), "b": (3.0, "base"), "c": (5.0, "base"), "d": (4.5, "c")}
    rows = results([Scores(n, {"r": (values + by).tolist()}, start=start) for n, (by, start) in shifts.items()])
    assert [row.get("start") for row in rows] == [None, "base", "base", "c"]
    assert "gain" not in rows[0]
    assert "base_gain" not in rows[0]
    for row, gain, base_gain in zip(rows[1:], (3.0, 5.0, -0.5), (3.0, 5.0, 4.5), strict=True):
        assert (row["gain"], row["base_gain"]) == pytest.approx((gain, base_gain))
        assert not {"gain_low", "gain_high", "base_gain_low", "base_gain_high"} & row.keys()


def test_gain_is_paired():
    """A gain of about 0.1 for every prompt is certain, however much the prompts differ."""
    values, noise = draws(5).normal(0, (10, 0.01), (200, 2)).T
    more = values + 0.1 + noise
    rows = results(chained(Scores("a", {"reward": values.tolist()}), Scores("b", {"reward": more.tolist()})))
    assert rows[1]["high"] - rows[1]["low"] > 1
    assert [rows[1][key] for key in sorted(GAINS)] == pytest.approx([0.1] * 3, abs=0.003)


def test_gain_does_not_see_a_shift_of_both():
    a, b = draws(6).normal(size=(2, 100))
    plain = results(chained(Scores("a", {"r": a.tolist()}), Scores("b", {"r": b.tolist()})))[1]
    moved = results(chained(Scores("a", {"r": (a + 7).tolist()}), Scores("b", {"r": (b + 7).tolist()})))[1]
    assert [moved[k] for k in sorted(GAINS)] == pytest.approx([plain[k] for k in sorted(GAINS)])
    assert moved["low"] == pytest.approx(plain["low"] + 7)


@pytest.mark.parametrize("categories", [(), [""] * 4, ["all"] * 4])
def test_without_categories_there_is_only_all(categories: list[str]):
    rows = results([Scores("base", {"r": [0.0, 1, 1, 0]}, categories)])
    assert [(row["category"], row["n"]) for row in rows] == [("all", 4)]


def test_some_prompts_may_lack_a_category():
    rows = results([Scores("base", {"r": [0.0, 1, 1, 0]}, ["x", "", "x", ""])])
    assert [(row["category"], row["n"]) for row in rows] == [("all", 4), ("x", 2)]


def test_a_metric_is_binary_only_if_it_is_so_in_every_stage():
    both = results(chained(Scores("base", {"r": [0.0] * 20}), Scores("soar", {"r": [0.5] * 20})))
    assert not {"low", "high", "gain_low", "gain_high"} & {key for row in both for key in row}
    share = results([Scores("base", {"r": [0.0] * 20}, units={"r": "share"})])[0]
    assert share["high"] == pytest.approx(0.1611, abs=1e-4)  # Wilson's


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_no_number_is_refused(bad: float):
    with pytest.raises(DataError, match=r"'soar'.*'ocr'.*prompt 1"):
        results([Scores("base", {"ocr": [0.0, 1.0]}), Scores("soar", {"ocr": [0.0, bad]})])


def test_no_prompts_are_refused_and_no_stages_are_no_rows():
    with pytest.raises(DataError, match="no held-out prompts"):
        results([Scores("base", {"ocr": []})])
    assert results([]) == []


@pytest.mark.parametrize("other", [{"r": [1.0]}, {"s": [1.0, 2.0]}])
def test_stages_must_be_scored_alike(other: dict[str, list[float]]):
    with pytest.raises(AssertionError):
        results([Scores("base", {"r": [1.0, 2.0]}), Scores("soar", other)])


def test_results_are_read_as_written(tmp_path, stages: list[Scores]):
    path = tmp_path / "run" / "results.json"
    write_results(path, results(stages))
    assert read_results(path) == json.loads(path.read_text()) == results(stages)
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize("text", ["{", "{}", '[{"stage": "base"}]', "[1]"])
def test_damaged_results_are_refused(tmp_path, text: str):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(DataError, match=r"results\.json"):
        read_results(tmp_path / "results.json")


def test_repeated_prompts_are_one_cluster():
    """Five samples of each of 30 prompts that agree tell no more than one of each."""
    hits = np.repeat((draws(9).random(30) < 0.5).astype(float), 5)
    more = np.repeat((draws(9).random(30) < 0.7).astype(float), 5)
    prompts = [f"p{n // 5}" for n in range(150)]
    units = {"r": "share"}

    def rows(prompts: list[str]) -> list:
        base, after = (
            Scores(n, {"r": v.tolist()}, prompts=prompts, units=units) for n, v in (("base", hits), ("b", more))
        )
        return results(chained(base, after))

    def widths(row) -> np.ndarray:
        return np.array([row[f"{name}high"] - row[f"{name}low"] for name in ("", "gain_")])

    clustered, ignorant = rows(prompts)[1], rows([])[1]
    assert clustered["value"] == ignorant["value"]
    assert (widths(clustered) > 1.8 * widths(ignorant)).all()


def test_a_block_beside_diversity_has_rows_and_the_unit_of_its_reward():
    """`also` holds the same reward at other sampling steps, on the prompts 1 and 2 alone."""
    written = {"diversity": {"rows": [0], "values": {"vendi": [2.0]}}}
    written["also"] = {"rows": [1, 2], "values": {"ocr, 6 steps": [1.0, 0.0]}}
    stages = [Scores("base", {"ocr": [0.0, 1, 1]}, ["x", "y", "y"], units={"ocr": "share"}, blocks=blocks_of(written))]
    found = {(row["metric"], row["category"]): (row["value"], row["n"], row.get("unit")) for row in results(stages)}
    assert found["ocr, 6 steps", "all"] == found["ocr, 6 steps", "y"] == (0.5, 2, "share")
    assert found["vendi", "all"] == (2.0, 1, "")
    assert ("vendi", "y") not in found
    assert [block.values for block in blocks_of({})] == [{}, {}]


def test_diversity_has_rows_of_its_own_prompts():
    """The prompts 0, 2 and 3 of five, in their categories; without a reward there are no others."""
    categories, prompts = ["x", "x", "y", "x", "y"], list("abcde")
    base, soar = ([3.0, 1.0, 2.0], [4.0, 1.5, 2.0])
    for values in ({"r": [0.0, 1.0, 1.0, 0.0, 1.0]}, {}):
        stages = [
            Scores(name, values, categories, prompts=prompts, blocks=[Block([0, 2, 3], {"vendi": found})])
            for name, found in (("base", base), ("soar", soar))
        ]
        found = [row for row in results(chained(*stages)) if row["metric"] == "vendi" and row["stage"] == "soar"]
        assert [(row["category"], row["n"], row["value"], row["unit"]) for row in found] == [
            ("all", 3, 2.5, ""),
            ("x", 2, 3.0, ""),
            ("y", 1, 1.5, ""),
        ]
        assert [row["gain"] for row in found] == [0.5, 0.5, 0.5]
        assert "low" not in found[2]


# The table


def test_the_table_of_five_categories_fits_120_columns(stages: list[Scores]):
    lines = printed(stages).splitlines()
    assert max(map(len, lines)) <= 120
    assert sum("paired" in line for line in lines) == 1
    assert all(any(name in line for line in lines) for name in NAMES)
    soar, grpo = (next(line for line in lines if line.startswith(name)) for name in ("soar", "grpo"))
    row = results(stages)[6]
    value, gain = f"{100 * row['value']:.1f} %", f"+{100 * row['gain']:.1f} pp"
    assert all(cell in soar for cell in (value, gain, "2m 51s", "233.2", "890 MiB"))
    assert all(cell in grpo for cell in ("2h 15m", "31.1", "3.0 GiB"))


@pytest.mark.parametrize(("width", "tables"), [(60, 2), (80, 2), (110, 2), (120, 1), (400, 1)])
def test_nothing_is_cut_or_wrapped(stages: list[Scores], width: int, tables: int):
    text, numbers = printed(stages, width), Numbers(percent=True)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert sum(line.startswith("soar") for line in text.splitlines()) == tables
    for row in results(stages):
        assert all(part in text for part in numbers.value(row))
        assert row["category"] != "all" or all(part in text for part in numbers.gain(row))


@pytest.mark.parametrize(("width", "tables"), [(60, 3), (80, 3), (110, 2), (140, 1)])
def test_branches_say_what_they_start_from(stages: list[Scores], width: int, tables: int):
    branched = [*stages, evolve(stages[1], stage="sft", start="base")]
    text, numbers = printed(branched, width), Numbers(percent=True)
    assert "…" not in text
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert sum(line.startswith("sft") for line in lines) == tables
    for stage, start in (("sft", "base"), ("soar", "base"), ("grpo", "soar")):
        assert re.search(rf"(?m)^{stage} .* {start} ", text)
    for row in results(branched):
        if row["category"] == "all":
            assert all(part in text for over in ("gain", "base_gain") for part in numbers.gain(row, over))
    assert "starts" not in printed(stages, width)


def test_a_table_is_printed_for_each_metric():
    values = {"accuracy": [0.0, 1.0], "reward": [-250.0, 120.0]}
    text = printed([Scores(name, values, units=SHARE) for name in ("base", "soar")])
    assert text.count("2 held-out prompts") == 2
    assert "50.0 %" in text
    assert "-65" in text
    assert "-6500" not in text


def test_names_are_not_markup():
    text = printed([Scores("[red]a[/]", {"r[0]": [0.0, 1.0]}, ["[b]x", "[b]x"])])
    assert all(name in text for name in ("[red]a[/]", "r[0]", "[b]x"))


def test_names_with_escapes_are_written_out():
    text = printed([Scores("a", {"r\x1b[2J": [0.0, 1.0]}, ["b\x9b5m", "b\x9b5m"])])
    assert all(name in text for name in ("r\\x1b[2J", "b\\x9b5m"))
    assert not {"\x1b", "\x9b"} & set(text)


def test_the_table_is_ascii_where_the_terminal_is(stages: list[Scores]):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    print_table(stages, results(stages), Console(file=file, width=120))
    file.flush()
    assert b"base" in raw.getvalue()


def test_numbers_show_sign_and_direction():
    row = {"value": 0.5, "low": 0.4, "high": 0.6, "gain": -0.0001, "gain_low": -0.02, "gain_high": 0.013}
    assert Numbers(percent=True).value(row) == ("50.0 %", "40.0-60.0")
    assert Numbers(percent=True).gain(row) == ("0.0 pp", "-2.0 to +1.3")
    assert direction(row, Numbers(percent=True)) == ""
    assert direction(row | {"gain_low": 0.001}, Numbers(percent=True)) == "up"
    assert direction(row | {"gain_high": -0.001}, Numbers(percent=True)) == "down"
    assert Numbers.of([row | {"low": -0.1}]) == Numbers(percent=False, decimals=3)
    assert Numbers.of([row | {"high": 1234.0}]) == Numbers(percent=False, decimals=0)


def test_the_unit_decides_how_numbers_are_written():
    """Not their range: an aesthetic score of 0.3 is no percentage."""
    row = {"value": 0.3, "low": 0.25, "high": 0.35, "gain": 0.1, "gain_low": 0.05, "gain_high": 0.15}
    share, plain = ([row | {"unit": unit}] for unit in ("share", ""))
    assert Numbers.of(share).value(row) == ("30.0 %", "25.0-35.0")
    assert Numbers.of(plain).value(row) == ("0.300", "0.250 to 0.350")
    assert Numbers.of(plain).gain(row) == ("+0.100", "+0.050 to +0.150")
    assert Numbers.of([row]) == Numbers(percent=True)  # as version 0.1 wrote it


def test_a_narrow_interval_gets_a_digit_more():
    row = {"unit": "", "value": 22.84, "low": 22.71, "high": 22.97}
    assert Numbers.of([row]).decimals == 2
    assert Numbers.of([row | {"low": 20.0, "high": 25.0}]).decimals == 1
    assert Numbers.of([{"unit": "", "value": 0.0}]).decimals == 2


def test_what_has_no_interval_says_so():
    row = {"unit": "", "value": 5.0, "gain": 0.1}
    assert Numbers.of([row]).value(row) == ("5.00", "no interval")
    assert Numbers.of([row]).gain(row) == ("+0.10", "no interval")
    assert direction(row, Numbers.of([row])) == ""


def test_color_needs_more_than_what_is_rounded_away():
    row = {"value": 0.5, "gain": 0.02, "gain_low": 0.0004, "gain_high": 0.04, "base_gain_high": -0.0004}
    assert direction(row, Numbers(percent=True)) == ""
    assert direction(row | {"gain_low": 0.0006}, Numbers(percent=True)) == "up"
    assert direction(row, Numbers(percent=True), "base_gain") == ""
    assert direction(row | {"base_gain_high": -0.0006}, Numbers(percent=True), "base_gain") == "down"


def test_costs_are_readable():
    times = {0: "-", 4.21: "4.2 s", 42.4: "42 s", 59.7: "1m 00s", 185: "3m 05s", 3599.8: "1h 00m", 7620: "2h 07m"}
    assert {seconds: duration(seconds) for seconds in times} == times
    assert [size(n) for n in (0, 890 << 20, 3 << 29)] == ["-", "890 MiB", "1.5 GiB"]


# The log


def test_the_log_is_json_lines_with_null_for_what_is_no_number(tmp_path):
    log = MetricsLog(tmp_path / "01-soar" / "metrics.jsonl")
    log.append(10, {"loss": 0.5, "reward": math.nan, "grad_norm": math.inf, "kept": 3})
    log.append(20, {"loss": torch.tensor(0.25), "reward": np.float32(0.5)})
    text = log.path.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert [json.loads(line) for line in text.splitlines()] == [
        {"step": 10, "loss": 0.5, "reward": None, "grad_norm": None, "kept": 3},
        {"step": 20, "loss": 0.25, "reward": 0.5},
    ]


def test_a_resume_drops_later_steps_and_half_a_line(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.truncate_after(0)
    assert not log.path.exists()
    for step in (10, 20, 30):
        log.append(step, {"loss": 1 / step})
    before = log.path.read_bytes()
    with log.path.open("a") as file:
        file.write('{"step": 40, "lo')
    assert [line["step"] for line in read_metrics(log.path)] == [10, 20, 30]
    log.truncate_after(30)
    assert log.path.read_bytes() == before
    log.truncate_after(20)
    log.append(30, {"loss": 1 / 30})
    assert log.path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("line", ["{]", "[1]", '{"loss": 1}', '{"step": "1"}'])
def test_a_damaged_line_is_named(tmp_path, line: str):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


# Figures


def test_curves_draw_a_panel_a_metric_and_the_same_bytes_again(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 61):
        noisy = 1 / step + draws(step).normal()
        log.append(step, {"loss": noisy if step != 7 else math.nan, "$x_{": step, "lr": 1e-5, "reward/ocr": 0.1})
    curves(log.path, tmp_path / "a.png")
    curves(log.path, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (int(110 * (0.3 + 3 * 3.9)), int(110 * (0.2 + 2 * 2.3)))


@pytest.mark.parametrize("lines", ["", '{"step": 1}\n', '{"step": 1, "loss": 2.0}\n', '{"step": 1, "loss": null}\n'])
def test_curves_of_almost_nothing_are_drawn(tmp_path, lines: str):
    (tmp_path / "metrics.jsonl").write_text(lines)
    curves(tmp_path / "metrics.jsonl", tmp_path / "metrics.png")
    with Image.open(tmp_path / "metrics.png") as image:
        image.verify()


def opened(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_the_grid_enlarges_tiny_images_without_interpolation(tmp_path):
    media = torch.rand(5, 3, 8, 16, dtype=torch.float64)
    grid(media, ["a red 3 left of a blue 7"] * 5, tmp_path / "grid.png", columns=3)
    sheet = opened(tmp_path / "grid.png")
    assert sheet.shape[1] == 3 * (192 + 10) + 10
    first = np.rint(255 * media[0].permute(1, 2, 0).numpy())
    assert np.array_equal(sheet[10:106, 10:202], first.repeat(12, 0).repeat(12, 1))
    assert (sheet[106:130, 10:202] < 128).any()  # the prompt
    assert (sheet[106:130, 202:212] == 255).all()


@pytest.mark.parametrize(("side", "scale", "shown"), [(96, None, 96), (40, None, 120), (200, None, 200), (8, 2, 16)])
def test_the_grid_has_the_size_it_should(tmp_path, side: int, scale: int | None, shown: int):
    grid(np.full((2, 3, side, side), 0.5, np.float32), ["", ""], tmp_path / "grid.png", 8, scale)
    assert opened(tmp_path / "grid.png").shape[1] == 2 * (shown + 10) + 10


def test_video_shows_frames_side_by_side(tmp_path):
    video = torch.zeros(1, 3, 7, 96, 96, dtype=torch.bfloat16)
    video[:, :, 2], video[:, :, 6] = 1, 0.5
    grid(video, ["p"], tmp_path / "a.png")
    grid(torch.cat([video[:, :, n] for n in (0, 2, 4, 6)], dim=-1), ["p"], tmp_path / "b.png")
    assert np.array_equal(opened(tmp_path / "a.png"), opened(tmp_path / "b.png"))


def test_clips_move(tmp_path):
    clips = torch.linspace(0, 1, 5).reshape(1, 1, 5, 1, 1).expand(2, 3, 5, 96, 120)
    animation(clips, ["p", "q"], tmp_path / "a.webp", fps=10)
    with Image.open(tmp_path / "a.webp") as image:
        assert (image.n_frames, image.info["loop"], image.width) == (5, 0, 2 * 130 + 10)
        seen, pauses = [], set()
        for number in range(image.n_frames):
            image.seek(number)
            seen.append(np.asarray(image.convert("L"))[60, 60] / 255)
            pauses.add(image.info["duration"])
    assert np.allclose(seen, clips[0, 0, :, 0, 0], atol=0.03)
    assert pauses == {100}


def test_long_and_wide_clips_keep_their_speed(tmp_path):
    clips = torch.rand(4, 3, 81, 8, 8).repeat_interleave(50, 4).repeat_interleave(30, 3)
    animation(clips, [""] * 4, tmp_path / "a.webp", fps=16)
    with Image.open(tmp_path / "a.webp") as image:
        assert image.n_frames == 32
        image.load()
        assert image.info["duration"] == round(1000 * 81 / 16 / 32)
        assert image.width == 1280


def test_many_clips_stay_within_what_webp_can_hold(tmp_path):
    animation(np.zeros((160, 3, 2, 400, 96)), [""] * 160, tmp_path / "a.webp")
    with Image.open(tmp_path / "a.webp") as image:
        assert 15900 < image.height <= 16000


def test_what_is_shown_of_clips_is_drawn_alike(tmp_path):
    clips = torch.rand(2, 3, 9, 96, 96)
    assert visible_frames(clips).shape == (2, 3, 4, 96, 96)
    grid(clips, ["p", "q"], tmp_path / "a.png")
    grid(visible_frames(clips), ["p", "q"], tmp_path / "b.png")
    assert np.array_equal(opened(tmp_path / "a.png"), opened(tmp_path / "b.png"))
    assert torch.equal(visible_frames(clips[:, :, 0]), clips[:, :, 0])


def test_pixels_that_are_no_numbers_are_seen(tmp_path):
    media = np.zeros((1, 3, 96, 96))
    media[0, 1, 5, 7] = np.nan
    media[0, :, 6, 7] = 9.0
    grid(media, ["p"], tmp_path / "grid.png")
    sheet = opened(tmp_path / "grid.png")
    assert sheet[15, 17].tolist() == [255, 0, 255]
    assert sheet[16, 17].tolist() == [255, 255, 255]


@pytest.mark.parametrize("media", [np.zeros((2, 4, 8, 8)), np.zeros((2, 3, 8, 8), np.uint8), np.zeros((3, 3, 8, 8))])
def test_media_of_another_kind_are_refused(tmp_path, media: np.ndarray):
    with pytest.raises(AssertionError):
        grid(media, ["a", "b"], tmp_path / "grid.png")


@given(st.text(max_size=200), st.integers(60, 300))
@settings(max_examples=50, deadline=None)
def test_wrapped_prompts_fit_and_lose_nothing_unsaid(prompt: str, width: int):
    text = _Text.fitting(width)
    lines = text.wrap(prompt, width)
    assert len(lines) <= 5
    assert all(text.font.getlength(line) <= width or len(line) == 1 for line in lines)
    if not (lines and lines[-1].endswith("…")):
        assert "".join(lines).replace(" ", "") == "".join(prompt.split())


def test_the_comparison_puts_stages_below_each_other(tmp_path):
    rows = [(name, np.full((5, 3, 96, 96), level)) for name, level in [("base", 0.0), ("soar", 0.2), ("grpo", 0.4)]]
    comparison(rows, [f"prompt {i}" for i in range(5)], tmp_path / "comparison.png", columns=3)
    sheet = opened(tmp_path / "comparison.png")
    column = sheet[:, -60, :]
    levels = [int(v) for v in column[:, 0] if v in (0, 51, 102)]
    assert levels == [0] * 96 + [51] * 96 + [102] * 96
    assert sheet.shape[0] > 6 * 96


def test_nothing_heavy_is_imported_to_import_the_report():
    heavy = "{'torch', 'matplotlib', 'PIL', 'rich'}"
    code = f"import sys, corefit.run.report; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
