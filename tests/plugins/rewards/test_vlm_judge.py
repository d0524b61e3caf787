"""`vlm_judge`, against a server on loopback: what it is asked, which answers count, and what happens to the others."""

from __future__ import annotations

import base64
import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from serving import Answer, Asked, serving

from corefit.errors import ConfigError
from corefit.testing import check_reward
from corefit_rewards import http
from corefit_rewards.http import ServiceError
from corefit_rewards.vlm_judge import ONLY_A_NUMBER, VlmJudge, parsed

PROMPTS, META = ["a red circle", "a blue square", "the letter A"], [{}, {}, {}]
SECRET = "sk-0123456789"


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    made: list[float] = []
    monkeypatch.setattr(http.time, "sleep", made.append)
    return made


@pytest.fixture
def media() -> torch.Tensor:
    """Three pictures [3, 3, 16, 12], each brighter than the one before."""
    noise = torch.from_numpy(np.random.default_rng(0).random((3, 3, 16, 12), dtype=np.float32))
    return noise * torch.tensor([0.3, 0.6, 1.0]).reshape(3, 1, 1, 1)


def said(text, **more) -> Answer:
    return Answer({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, **more}]})


def picture(asked: Asked) -> np.ndarray:
    """The picture of a request, as the server decodes it."""
    kind, _, data = asked.body["messages"][0]["content"][0]["image_url"]["url"].partition(",")
    assert kind in ("data:image/png;base64", "data:image/jpeg;base64")
    return np.array(Image.open(io.BytesIO(base64.b64decode(data))))


def question(asked: Asked) -> str:
    return asked.body["messages"][0]["content"][1]["text"]


def brightness(asked: Asked, number: int) -> Answer:
    """A judge that answers how bright the picture is, from 0 to 10."""
    return said(f"{picture(asked).mean() / 25.5:.4f}")


def test_keeps_the_rules_of_rewards(media):
    with serving(brightness) as server:
        check_reward(VlmJudge(url=f"{server.url}/v1", model="judge"), media)


def test_what_is_asked(media):
    with serving(brightness) as server:
        scores = VlmJudge(url=f"{server.url}/v1/", model="judge").score(media, PROMPTS, META)
    assert scores.tolist() == pytest.approx((media.mean((1, 2, 3)) * 10).tolist(), abs=0.02)
    assert {asked.path for asked in server.asked} == {"/v1/chat/completions"}
    by_prompt = {next(p for p in PROMPTS if p in question(asked)): asked for asked in server.asked}
    for prompt, one in zip(PROMPTS, media, strict=True):
        asked = by_prompt[prompt]
        assert np.array_equal(picture(asked), (one * 255).round().byte().movedim(0, -1).numpy())
        assert "from 0 to 10" in question(asked)
        assert asked.body["model"] == "judge"
        assert (asked.body["temperature"], asked.body["max_tokens"]) == (0, 64)
        assert "Authorization" not in asked.headers


def test_keys_change_what_is_asked(media, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    judge = {
        "question": 'Rate "{prompt}" with braces {} and {"score": 1}, {low} to {high}',
        "scale": (1.0, 5.0),
        "answer": r"Final Score:\s*([1-5](?:\.\d+)?)",
        "token_env": "JUDGE_KEY",
        "form": "jpeg",
        "options": {"max_completion_tokens": 9},
    }
    with serving(lambda asked, number: said("Good.\nFinal Score: 3.5")) as server:
        made = VlmJudge(url=f"{server.url}/v1/chat/completions", model="m", **judge)
        made.check()
        assert made.score(media[:1], ["{low}"], [{}]).tolist() == [3.5]
    ready, asked = server.asked
    assert (ready.path, asked.path) == ("/v1/models", "/v1/chat/completions")
    assert question(asked) == 'Rate "{low}" with braces {} and {"score": 1}, 1 to 5'
    assert asked.headers["Authorization"] == ready.headers["Authorization"] == f"Bearer {SECRET}"
    assert asked.body["max_completion_tokens"] == 9
    assert "max_tokens" not in asked.body


def test_requests_are_sent_at_once_but_no_more_than_parallel(media):
    together, most, lock, both = [0], [0], threading.Lock(), threading.Event()

    def counted(asked, number):
        with lock:
            together[0] += 1
            most[0] = max(most[0], together[0])
            if together[0] == 2:
                both.set()
        both.wait(5)
        with lock:
            together[0] -= 1
        return said("5")

    with serving(counted) as server:
        scores = VlmJudge(url=server.url, model="m", parallel=2).score(media, PROMPTS, META)
    assert scores.tolist() == [5, 5, 5]
    assert most == [2]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_overloaded_endpoint_is_asked_again(status, media, pauses):
    def busy(asked, number):
        return Answer("busy", status, {"Retry-After": "3"}) if number < 2 else said("7")

    with serving(busy) as server:
        assert VlmJudge(url=server.url, model="m").score(media[:1], PROMPTS[:1], META[:1]).tolist() == [7]
    assert pauses == [3, 3]


def test_a_slow_endpoint_is_asked_again(media):
    def slow(asked, number):
        return Answer(seconds=5) if number == 0 else said("7")

    with serving(slow) as server:
        judge = VlmJudge(url=server.url, model="m", timeout=0.3)
        assert judge.score(media[:1], PROMPTS[:1], META[:1]).tolist() == [7]


def test_a_dead_endpoint_stops_the_run(media):
    with serving(lambda asked, number: Answer("no", 500)) as server:
        judge = VlmJudge(url=server.url, model="m", retries=2)
        with pytest.raises(ServiceError, match=r"could not score 'a red circle': .*status 500.*tried 3 times"):
            judge.score(media[:1], PROMPTS[:1], META[:1])
    assert len(server.asked) == 3
    with pytest.raises(ServiceError, match="cannot be reached"):
        judge.check()
    with pytest.raises(ServiceError, match=r"could not score 'a red circle': .*cannot be reached"):
        judge.score(media[:1], PROMPTS[:1], META[:1])


NONSENSE = [
    said("I would say 7"),
    said("eleven"),
    said("11"),
    said("-1"),
    said("nan"),
    said("inf"),
    said(""),
    said(None),
    said(7),
    said("7\n8"),
    said("1", finish_reason="length"),
    Answer({"choices": []}),
    Answer({}),
    Answer([]),
    Answer("7"),
    Answer({"choices": [7]}),
]


@pytest.mark.parametrize("answer", NONSENSE, ids=lambda answer: str(answer.body)[-40:])
def test_nonsense_is_asked_again_and_never_scores(answer, media):
    with serving(lambda asked, number: answer) as server:
        judge = VlmJudge(url=server.url, model="m", attempts=2)
        with pytest.raises(ServiceError, match=r"could not score 'a red circle'.*from 0 to 10"):
            judge.score(media[:1], PROMPTS[:1], META[:1])
    assert [asked.body.get("seed") for asked in server.asked] == [None, 1]
    with serving(lambda asked, number: answer if number == 0 else said(" 7.5\n")) as server:
        judge = VlmJudge(url=server.url, model="m")
        assert judge.score(media[:1], PROMPTS[:1], META[:1]).tolist() == [7.5]


def test_one_failure_of_many_is_raised_with_its_prompt(media):
    def picky(asked, number):
        return said("what?" if "blue" in question(asked) else "5")

    with serving(picky) as server, pytest.raises(ServiceError, match=r"'a blue square'.*'what\?'"):
        VlmJudge(url=server.url, model="m").score(media, PROMPTS, META)


def test_no_secret_is_in_messages(media, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    with serving(lambda asked, number: Answer({"error": f"bad key {SECRET}"}, 401)) as server:
        judge = VlmJudge(url=server.url, model="m", token_env="JUDGE_KEY")
        for call in (judge.check, lambda: judge.score(media[:1], PROMPTS[:1], META[:1])):
            with pytest.raises(ServiceError, match="refuses the token") as caught:
                call()
            assert SECRET not in str(caught.value)
    assert SECRET not in repr(judge)


def test_a_missing_secret_is_said(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match="environment variable JUDGE_KEY, which is not set"):
        VlmJudge(url="http://127.0.0.1:9", model="m", token_env="JUDGE_KEY").check()


def test_what_is_not_finite_is_not_asked_about(media):
    media[0, 0, 0, 0] = torch.nan
    with serving(brightness) as server:
        scores = VlmJudge(url=server.url, model="m").score(media, PROMPTS, META)
    assert scores.isnan().tolist() == [True, False, False]
    assert len(server.asked) == 2


def test_clips_are_judged_by_their_frames(media):
    clip = media.movedim(0, 1)[None]
    with serving(brightness) as server:
        judge = VlmJudge(url=server.url, model="m", pool="min", frames=2)
        score = judge.score(clip, PROMPTS[:1], META[:1])
    assert len(server.asked) == 2
    assert score.tolist() == pytest.approx([float(media[0].mean() * 10)], abs=0.02)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("url", "localhost", "'url' must be an address"),
        ("url", f"http://me:{SECRET}@host/v1", "'url' contains a password"),
        ("model", "", "model"),
        ("question", " ", "'question' is blank"),
        ("question", "Rate {promt}", r"'question' has a place for 'promt'; .* \{prompt\}, \{low\}, \{high\}"),
        ("answer", "(", "'answer' is not a regular expression"),
        ("answer", r"\d+", "'answer' must have one group"),
        ("scale", (1.0, 1.0), "'scale' must be"),
        ("scale", (0.0, float("nan")), "'scale' must be"),
        ("token_env", SECRET, "'token_env' must be the name of an environment variable"),
        ("options", {"model": "x"}, "'options' must not have 'model'"),
        ("timeout", 0.0, "timeout"),
        ("attempts", 0, "attempts"),
        ("parallel", 0, "parallel"),
    ],
)
def test_wrong_keys_are_refused(key, value, said):
    with pytest.raises(ValueError, match=said) as caught:
        VlmJudge(**{"url": "http://127.0.0.1:8000/v1", "model": "m", key: value})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "number"),
    [("7", 7), (" 7.25 ", 7.25), ("+7", 7), ("0", 0), ("10", 10), ("10.01", None), ("7/10", None), ("7.", None)],
)
def test_answers_of_a_number_alone(text, number):
    assert parsed(text, ONLY_A_NUMBER, 0, 10) == number


@pytest.mark.parametrize(
    ("text", "number"), [("Score: 3", 3), ("Score: 3 ... Score: 3", 3), ("Score: 3, Score: 4", None), ("3", None)]
)
def test_answers_with_a_pattern(text, number):
    assert parsed(text, r"Score: (\d)", 1, 5) == number


def test_a_pattern_that_finds_no_number_gives_none():
    assert parsed("Score: good", r"Score: (\w+)", 1, 5) is None
