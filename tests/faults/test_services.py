"""A run whose reward is remote ends in the same bytes, whatever happens to its service on the way."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from typing import Any

import attrs
import numpy as np
import pytest
import served
from harness import PIPELINE, Project, Whole, differences
from in_turn import DEAD, RESTARTED, RUN, Played, Series
from served import Served
from serving import Answer, Asked, serving
from test_kills import Forks, copied

from corefit.types import wire
from corefit.types.wire import Health, Sample
from corefit_rewards import http

REMOTE = '{{ use = "remote", url = "{url}", batch = 2, retries = {retries} }}'
STEPS: Mapping[str, object] = {
    "stage.grpo.steps": 12,
    "stage.grpo.micro_batch": 2,
    "stage.grpo.checkpoint_every": 2,
    "stage.grpo.log_every": 1,
    "eval.batch": 2,
}
"""Two requests a step, a checkpoint every other step, and a line of metrics every step."""


def with_remote(project: Project, url: str, *, retries: int, evaluated: bool) -> Project:
    """The second stage alone, which learns from a service, and is evaluated with it or with the local reward."""
    file = project.folder / PIPELINE
    text = file.read_text()
    first, second = text.index('[[stage]]\nname = "soar"'), text.index('[[stage]]\nname = "grpo"')
    remote = REMOTE.format(url=url, retries=retries)
    text = text[:first] + text[second:].replace('{ use = "bright", weight = 1.0 }', remote)
    file.write_text(text.replace('{ use = "bright" }', remote) if evaluated else text)
    return project


@pytest.fixture
def service(project) -> Generator[Served]:
    found = served.start(project.folder)
    yield found
    found.process.kill()


def played(project, service: Served, kills: int, seed: int) -> Played:
    def fresh(number: int) -> Forks:
        one = attrs.evolve(copied(project, f"round-{number}"), settings=STEPS)
        with_remote(one, service.url, retries=4, evaluated=True)
        return one

    series = Series(Whole.of(fresh(0)), fresh, service, np.random.default_rng(seed))
    try:
        return series.play(kills)
    finally:
        series.service.process.kill()
        print(f"{len(series.kills)} kills, {series.kills.count(RUN)} of the run; {series.survived} outlived")
        print(", ".join(f"{phase} {number}" for phase, number in Counter(series.phases).most_common()))


def test_run_and_service_killed_in_turn(project, service):
    found = played(project, service, kills=3, seed=0)
    assert not found.wrong, "\n".join([*found.wrong, *found.kills])
    assert found.kills == [RUN, RESTARTED, RUN]


@pytest.mark.slow
def test_run_and_service_killed_in_turn_20_times(project, service):
    found = played(project, service, kills=20, seed=1)
    assert not found.wrong, "\n".join([*found.wrong, *found.kills])
    assert (found.kills.count(RUN), found.kills.count(DEAD)) == (10, 5)


def test_a_served_reward_trains_as_the_same_reward_of_rounded_media_does(project, service):
    """The wiring: what the service gives is what is learned from, bit by bit."""
    rounded = project.folder / "rounded.py"
    text = (project.folder / "bright.py").read_text().replace("media.flatten", "((media * 255).round() / 255).flatten")
    rounded.write_text(text.replace('"bright"', '"rounded"'))
    outcomes = {}
    for name in ("remote", "rounded"):
        one = attrs.evolve(copied(project, name), settings=STEPS)
        with_remote(one, service.url, retries=0, evaluated=True)
        if name == "rounded":
            remote = REMOTE.format(url=service.url, retries=0)
            file = one.folder / PIPELINE
            swapped = file.read_text().replace(remote, '{ use = "rounded" }')
            file.write_text(swapped.replace('["bright.py"]', '["rounded.py"]'))
        assert one.start().wait() == 0, one.log.read_text()
        found = one.outcome()
        outcomes[name] = {path: digest for path, digest in found.items() if path.endswith((".safetensors", "s.jsonl"))}
    assert len(outcomes["remote"]) > 3
    assert outcomes["remote"] == outcomes["rounded"]


# nonsense


def first(content: Any, **changes: Any) -> Any:
    return {**content, "results": [{**content["results"][0], **changes}, *content["results"][1:]]}


def half(content: Any) -> Answer:
    """An answer that breaks off, though its length was announced."""
    whole = json.dumps(content).encode()
    return Answer(whole[: len(whole) // 2], headers={"Content-Length": str(len(whole))})


FAULTS: Mapping[str, Callable[[Any], Answer]] = {
    "there are 1 results for 2 samples": lambda c: Answer({**c, "results": c["results"][1:]}),
    "score is '0.5'": lambda c: Answer(first(c, score="0.5")),
    "score is nan": lambda c: Answer(first(c, score=float("nan"))),
    "not JSON": lambda c: Answer(b"<html>Bad gateway</html>"),
    "cannot be reached": half,
    "more than 64 MiB": lambda c: Answer(b" " * ((64 << 20) + 1)),
    "not '0-": lambda c: Answer({**c, "results": c["results"][::-1]}),
    "another reward": lambda c: Answer({**c, "version": "v2"}),
    "could not score 1 of 2 samples": lambda c: Answer(
        {**c, "results": [{"id": c["results"][0]["id"], "error": "out of memory"}, c["results"][1]]}
    ),
    "answered with status 500": lambda c: Answer({"detail": "no"}, status=500),
    "did not answer within": lambda c: Answer(c, seconds=30),
    "Server disconnected": lambda c: Answer(c, hang_up=True),
}
"""What a run says of each, and how a service of brightness comes to answer so."""


def brightness(asked: Asked) -> Any:
    if asked.path == "/health":
        return json.loads(wire.write_health(Health("brightness", "v1", {})))
    read = wire.read_request(json.dumps(asked.body).encode(), 1 << 26)
    found = [{"id": one.id, "score": float(one.media.double().mean() / 255)} for one in read if isinstance(one, Sample)]
    return {"version": "v1", "results": found}


def test_a_service_that_talks_nonsense_stops_the_run_and_nothing_is_lost(project, monkeypatch):
    """One run meets a fault after every few good answers; each time it stops with a sentence and goes on when told."""
    monkeypatch.setattr(http, "FIRST_PAUSE", 0.01)
    faults = list(FAULTS.items())
    good = 0

    def answer(asked: Asked, number: int) -> Answer:
        nonlocal good
        content = brightness(asked)
        if asked.path == "/health":
            return Answer(content)
        good -= 1
        return Answer(content) if good >= 0 or not faults else faults[0][1](content)

    settings = {**STEPS, "stage.grpo.steps": 16, "stage.grpo.checkpoint_every": 1}
    with serving(answer) as server:
        whole, spoilt = (copied(project, name) for name in ("whole", "spoilt"))
        for one in (whole, spoilt):
            with_remote(one, server.url, retries=1, evaluated=False)
        words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        good = 1 << 30
        ended = project.main("run", f"whole/{PIPELINE}", *words)
        assert ended.status == 0, ended.err
        while faults:
            said, good = faults[0][0], 3
            slow = ["--set", "stage.grpo.reward.remote.timeout=2"] if "within" in said else []
            ended = project.main("run", f"spoilt/{PIPELINE}", *words, *slow)
            assert ended.status == 2, said
            assert said in ended.err
            assert "run the same command again, which continues" in ended.err
            assert "Traceback" not in ended.err
            faults.pop(0)
        ended = project.main("run", f"spoilt/{PIPELINE}", *words)
        assert ended.status == 0, ended.err
    wrong = differences(spoilt.outcome(), whole.outcome())
    assert not wrong, "\n".join(wrong)
