"""`corefit serve-reward`: what it answers and refuses, what it scores together, and how it starts and ends."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import served
import torch
from attrs import define, field
from fastapi.testclient import TestClient

from corefit import Reward
from corefit.run.service.app import Limits, Service
from corefit.run.service.scoring import Scorer
from corefit.run.service.serve import Opened
from corefit.run.service.waiting import Line
from corefit.types import Weighted, wire
from corefit.types.wire import Answer, Health, Result, Sample

HERE = torch.device("cpu")


@define
class Moody(Reward):
    """Brightness, except for prompts that it cannot stand; remembers the calls."""

    calls: list[int] = field(factory=list[int])

    def score(self, media, prompts, meta):
        self.calls.append(len(media))
        if "bad" in prompts:
            raise RuntimeError("I will not score that")
        scores = media.flatten(1).mean(1)
        return torch.where(torch.tensor([p == "nan" for p in prompts]), torch.nan, scores)


def client(reward: Reward, *, token: str = "", size: int = 1 << 20, samples: int = 8) -> TestClient:
    line = Line(Scorer(Weighted("moody", reward), HERE).results)
    service = Service(
        line=line, health=Health("moody", "v1", {}), limits=Limits(size=size, samples=samples), token=token
    )
    return TestClient(service.app())


def asked(http: TestClient, prompts: Sequence[str], media: torch.Tensor | None = None, **headers: str) -> Any:
    media = torch.rand(len(prompts), 3, 4, 4) if media is None else media
    ids, content = wire.write_request(media, prompts, [{}] * len(prompts))
    response = http.post("/score", json=content, headers=headers)
    return wire.read_answer(response.json(), ids) if response.status_code == 200 else response


def test_scores_are_those_of_the_rounded_media():
    media = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    with client(Moody()) as http:
        answer = asked(http, ["a", "b", "c"], media)
    rounded = (media * 255).round() / 255
    assert [one.score for one in answer.results] == Moody().score(rounded, ["a", "b", "c"], []).double().tolist()
    assert answer.version == "v1"


def test_an_error_is_that_of_its_sample_and_the_others_are_scored():
    reward = Moody()
    with client(reward) as http:
        answer = asked(http, ["a", "bad", "nan", "d"])
    errors = [one.error for one in answer.results]
    assert errors[0] == errors[3] == ""
    assert errors[1].startswith("RuntimeError: I will not score that (test_service.py:")
    assert errors[2] == "its score is nan"
    assert [one.score is None for one in answer.results] == [False, True, True, False]
    assert reward.calls == [4, 1, 1, 1, 1]


def test_a_picture_that_cannot_be_read_is_an_error_and_the_reward_never_sees_it():
    reward = Moody()
    ids, content = wire.write_request(torch.rand(2, 3, 4, 4), ["a", "b"], [{}] * 2)
    content["samples"][0]["picture"] = "????"
    with client(reward) as http:
        answer = wire.read_answer(http.post("/score", json=content).json(), ids)
    assert "not a whole PNG" in answer.results[0].error
    assert answer.results[1].score is not None
    assert reward.calls == [1]


def test_pictures_of_several_sizes_are_answered_in_their_order():
    _, small = wire.write_request(torch.zeros(1, 3, 2, 2), ["small"], [{}])
    _, large = wire.write_request(torch.ones(2, 3, 4, 4), ["large", "larger"], [{}] * 2)
    samples = [large["samples"][0], small["samples"][0], large["samples"][1]]
    ids = [f"{number}" for number in range(3)]
    content = {"format": 1, "samples": [{**one, "id": name} for one, name in zip(samples, ids, strict=True)]}
    with client(Moody()) as http:
        answer = wire.read_answer(http.post("/score", json=content).json(), ids)
    assert [one.score for one in answer.results] == [1.0, 0.0, 1.0]


def test_a_reward_that_gives_nonsense_or_exits_is_an_error_and_not_a_score():
    @define
    class Wrong(Reward):
        def score(self, media, prompts, meta):
            if prompts[0] == "exit":
                raise SystemExit(0)
            return torch.zeros(7)

    with client(Wrong()) as http:
        (nonsense,) = asked(http, ["a"]).results
        (exited,) = asked(http, ["exit"]).results
    assert "score() gave float32 [7] for 1 samples" in nonsense.error
    assert "called sys.exit(0)" in exited.error


def test_limits_and_malformed_requests():
    with client(Moody(), size=4000, samples=3) as http:
        assert asked(http, ["a"] * 4).json()["detail"] == "4 samples are more than 3 in one request"
        large = http.post("/score", content=b" " * 4001, headers={"content-type": "application/json"})
        assert (large.status_code, large.json()["detail"]) == (413, "the request is larger than 0 MiB")
        assert http.post("/score", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
        broken = http.post("/score", content=b"{", headers={"content-type": "application/json"})
        assert broken.status_code == 400
        assert "the request is not JSON" in broken.json()["detail"]
        assert isinstance(asked(http, ["a"] * 3), Answer)


def test_a_token_is_asked_for_everywhere():
    with client(Moody(), token="secret") as http:
        for wrong in ({}, {"Authorization": "Bearer other"}, {"Authorization": "secret"}):
            assert http.get("/health", headers=wrong).status_code == 401
            assert asked(http, ["a"], **wrong).status_code == 401
        right = {"Authorization": "Bearer secret"}
        assert wire.read_health(http.get("/health", headers=right).json()).name == "moody"
        assert isinstance(asked(http, ["a"], **right), Answer)


async def here() -> bool:
    return False


async def left() -> bool:
    return True


def waiting(batch: int, *requests: tuple[int, Callable[[], Any]]) -> tuple[list[int], list[list[str]]]:
    """The sizes of the calls, and the ids of the results, of requests of so many samples that arrive at once."""
    calls: list[int] = []

    def score(samples: Sequence[Sample]) -> list[Result]:
        calls.append(len(samples))
        return [Result(one.id, score=0.0) for one in samples]

    async def play() -> list[Sequence[Result]]:
        line = Line(score, batch)
        work = asyncio.create_task(line.work())
        found = await asyncio.gather(
            *(line.results(samples(r, count), gone) for r, (count, gone) in enumerate(requests))
        )
        work.cancel()
        return found

    def samples(r: int, count: int) -> list[Sample]:
        return [Sample(f"{r}.{n}", torch.zeros(3, 1, 1), "", {}) for n in range(count)]

    return calls, [[one.id for one in results] for results in asyncio.run(play())]


def test_waiting_requests_are_scored_together_only_if_asked_for():
    requests = [(1, here), (2, here), (2, here), (5, here)]
    ids = [["0.0"], ["1.0", "1.1"], ["2.0", "2.1"], [f"3.{n}" for n in range(5)]]
    assert waiting(0, *requests) == ([1, 2, 2, 5], ids)
    assert waiting(4, *requests) == ([3, 2, 5], ids)


def test_nobody_waits_for_a_request_whose_client_is_gone():
    assert waiting(0, (1, here), (4, left), (2, here)) == ([1, 2], [["0.0"], [], ["2.0", "2.1"]])


def test_the_version_tells_keys_and_code_apart(project, monkeypatch):
    monkeypatch.chdir(project.folder)
    file = project.folder / "bright.py"
    versions = {
        "as it is": Opened.of("bright", [], [file]).health.version,
        "again": Opened.of("bright", ["gain=1.0"], [file]).health.version,
        "other keys": Opened.of("bright", ["gain=2.0"], [file]).health.version,
    }
    file.write_text(file.read_text().replace("mean(1)", "amax(1)"))
    versions["other code"] = Opened.of("bright", [], [file]).health.version
    assert versions["as it is"] == versions["again"]
    assert len(set(versions.values())) == 3


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["brigth"], "no reward is called 'brigth' (did you mean 'bright'?)"),
        (["bright", "--set", "gian=2"], "reward.gian is not a key (did you mean 'gain'?)"),
        (["bright", "--set", "gain=much"], "reward.gain: must be a number, not 'much'"),
        (["bright", "--host", "0.0.0.0"], "--host 0.0.0.0: other machines could reach it, so it needs a token"),
        (["bright", "--token-env", "COREFIT_NO_SUCH"], "--token-env COREFIT_NO_SUCH: the environment variable is not"),
        (["bright", "--plugin", "no.py"], "there is no file no.py"),
    ],
)
def test_what_cannot_be_served_is_said_before_it_listens(project, args, said):
    files = [] if "no.py" in args else ["--plugin", "bright.py"]
    ended = project.main("serve-reward", *args, *files, "--port", "0")
    assert ended.status == 2
    assert said in ended.err
    assert "Traceback" not in ended.err


def test_a_port_in_use_is_named(project):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ended = project.main("serve-reward", "bright", "--plugin", "bright.py", "--port", port)
    assert ended.status == 2
    assert f"--port {port}: it cannot listen there (Address already in use)" in ended.err


def test_a_missing_package_is_named_with_the_extra(project, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fastapi", None)
    ended = project.main("serve-reward", "bright", "--plugin", "bright.py", "--port", "0")
    assert ended.status == 2
    assert "pip install 'corefit[rewards]'" in ended.err


SLOW = """
    def score(self, media, prompts, meta):
        import time

        from pathlib import Path

        Path("scoring").touch()
        time.sleep(0.5)
        return media.flatten(1).mean(1) * self.gain
"""


def test_it_finishes_the_requests_in_progress_and_says_what_it_did(project):
    import httpx

    text = (project.folder / "bright.py").read_text()
    (project.folder / "bright.py").write_text(text.replace("\n    def score", f"{SLOW}\n    def other"))
    service = served.start(project.folder, "--set", "gain=2")
    ids, content = wire.write_request(torch.ones(1, 3, 2, 2), ["a"], [{}])
    marker: Path = project.folder / "scoring"

    async def stopped_while_it_scores() -> httpx.Response:
        async with httpx.AsyncClient(trust_env=False) as http:
            answer = asyncio.create_task(http.post(f"{service.url}/score", json=content, timeout=60))
            late = time.monotonic() + 60
            while not marker.exists() and time.monotonic() < late:
                await asyncio.sleep(0.01)
            service.process.send_signal(signal.SIGTERM)
            return await answer

    response = asyncio.run(stopped_while_it_scores())
    assert [one.score for one in wire.read_answer(json.loads(response.content), ids).results] == [2.0]
    assert service.process.wait(60) == 0, service.said
    assert service.said.splitlines()[1:] == [
        "stopping after the requests in progress; once more to stop now",
        "stopped: 1 score in 1 request, 0 errors",
    ]
