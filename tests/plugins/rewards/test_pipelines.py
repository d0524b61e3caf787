"""Rewards in a pipeline, as a user types it: what `corefit check` refuses, what a run scores, and how it fails."""

from __future__ import annotations

import json

import pytest
from conftest import Project
from detectors import tiny_color_clip, tiny_yolos
from serving import Answer, serving

from corefit_rewards import http

JUDGE = '{ use = "vlm_judge", url = "URL/v1", model = "judge", retries = 0 }'


def only_evaluated(project: Project, *rewards: str) -> None:
    """One stage of SOAR, and these rewards of the held-out prompts."""
    start, end = project.text.index('[[stage]]\nname = "grpo"'), project.text.index("[eval]")
    project.write(project.text[:start] + project.text[end:])
    project.swap(('reward = [{ use = "bright" }]', f"reward = [{', '.join(rewards)}]"), ("steps = 2", "steps = 1"))


def means(project: Project) -> dict[str, float]:
    rows = json.loads((project.folder / "runs" / "tiny" / "results.json").read_text())
    return {row["metric"]: row["value"] for row in rows if row["stage"] == "base" and row["category"] == "all"}


def test_a_run_is_scored_by_all_of_them(project: Project):
    held = [{"prompt": f'a sign "{word}"', **TAGGED} for word in ("sky", "sea")]
    project.lines("heldout.jsonl.new", *held)
    (project.folder / "heldout.jsonl").unlink()
    (project.folder / "heldout.jsonl.new").rename(project.folder / "heldout.jsonl")
    tiny_yolos(project.folder / "yolos")
    tiny_color_clip(project.folder / "clip")
    with serving(lambda asked, number: Answer({"choices": [{"message": {"content": "7"}}]})) as server:
        only_evaluated(
            project,
            '{ use = "ocr", threads = 1 }',
            '{ use = "sharpness" }',
            '{ use = "jpeg_size", wanted = "large" }',
            '{ use = "geneval", detector = "yolos", clip = "clip", rule = "share" }',
            JUDGE.replace("URL", server.url),
        )
        said = project.main("check", "pipeline.toml")
        assert said.status == 0, said.err
        said = project.main("run", "pipeline.toml")
        assert said.status == 0, said.err
    found = means(project)
    assert found["vlm_judge"] == 7
    assert found["ocr"] == 0  # 16 x 16 pixels of an untrained model
    assert found["sharpness"] > 0
    assert 0.1 < found["jpeg_size"] < 2
    assert 0 <= found["geneval"] <= 1


TAGGED = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}


def test_a_prompt_that_quotes_nothing_stops_the_run(project: Project):
    only_evaluated(project, '{ use = "ocr", threads = 1 }')
    said = project.main("run", "pipeline.toml")
    assert said.status == 2
    assert "'a red sky' has no text in double quotes" in " ".join(said.err.split())
    assert "Traceback" not in said.err


def test_check_says_what_is_missing(project: Project, monkeypatch: pytest.MonkeyPatch):
    only_evaluated(project, JUDGE.replace("URL", "http://127.0.0.1:9"))
    said = project.main("check", "pipeline.toml")
    assert said.status == 2
    assert "cannot be reached" in said.err
    project.swap((JUDGE.replace("URL", "http://127.0.0.1:9"), '{ use = "geneval", detector = "./none" }'))
    said = project.main("check", "pipeline.toml")
    assert said.status == 2
    assert "no such folder" in said.err


def test_a_judge_that_talks_nonsense_stops_the_run(project: Project, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)
    with serving(lambda asked, number: Answer({"choices": [{"message": {"content": "Lovely!"}}]})) as server:
        only_evaluated(project, JUDGE.replace("URL", server.url))
        said = project.main("run", "pipeline.toml")
    assert said.status == 2
    assert "vlm_judge could not score 'a red sky'" in " ".join(said.err.split())
    assert "Traceback" not in said.err
    assert not (project.folder / "runs" / "tiny" / "results.json").exists()
