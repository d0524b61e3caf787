"""The reward `remote`: what it sends, what it accepts, what it says when something is wrong, and what `check` finds."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from served import free_port
from serving import Answer, Asked, Server, serving

from corefit.errors import ConfigError, CorefitError
from corefit.pipeline import read
from corefit.run import identity
from corefit.types import wire
from corefit.types.wire import Health, Sample
from corefit_rewards.remote import Remote


def brightness(asked: Asked, version: str = "v1") -> Any:
    """What a service of brightness answers, as JSON."""
    if asked.path == "/health":
        return json.loads(wire.write_health(Health("brightness", version, {})))
    read = wire.read_request(json.dumps(asked.body).encode(), 1 << 26)
    found = [{"id": one.id, "score": float(one.media.double().mean() / 255)} for one in read if isinstance(one, Sample)]
    return {"version": version, "results": found}


def answering(change: Callable[[Any], Any] = lambda content: content, **keys: Any) -> Any:
    """A service of brightness whose answers to requests for scores are changed."""

    def answer(asked: Asked, number: int) -> Answer:
        content = brightness(asked)
        return Answer(content) if asked.path == "/health" else Answer(change(content), **keys)

    return serving(answer)


def scored(server: Server, media: torch.Tensor, **keys: Any) -> list[float]:
    prompts = [f"prompt {n}" for n in range(len(media))]
    meta = [{"n": n} for n in range(len(media))]
    return Remote(url=server.url, **{"retries": 0, **keys}).score(media, prompts, meta).tolist()


@pytest.mark.parametrize("shape", [(3, 6, 5), (3, 4, 6, 5)], ids=["pictures", "clips"])
def test_scores_are_those_of_the_rounded_media_in_the_order_of_the_rows(shape):
    media = torch.rand(7, *shape, generator=torch.Generator().manual_seed(0))
    rounded = (media * 255).round()
    with answering() as server:
        found = scored(server, media, batch=3)
        sent = [len(asked.body["samples"]) for asked in server.asked if asked.path == "/score"]
        told = [(one["prompt"], one["meta"]) for asked in server.asked[1:] for one in asked.body["samples"]]
    assert found == [float(one.double().mean() / 255) for one in rounded]
    assert sent == [3, 3, 1]
    assert told == [(f"prompt {n}", {"n": n}) for n in range(7)]


def test_media_that_are_not_finite_are_not_sent_and_their_score_is_nan():
    media = torch.full((3, 3, 2, 2), 0.2)
    media[1, 0, 0, 0] = torch.nan
    with answering() as server:
        found = torch.tensor(scored(server, media))
        assert [len(asked.body["samples"]) for asked in server.asked[1:]] == [2]
    assert found.isnan().tolist() == [False, True, False]


def first(content: Any, **changes: Any) -> Any:
    """An answer with another first result."""
    results = [{**content["results"][0], **changes}, *content["results"][1:]]
    return {**content, "results": results}


NONSENSE: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "too few": ("there are 1 results for 2 samples", lambda c: {**c, "results": c["results"][1:]}),
    "a list": ("it is not a JSON object", lambda c: c["results"]),
    "a text": ("score is '0.5', not a finite number", lambda c: first(c, score="0.5")),
    "nan": ("score is nan, not a finite number", lambda c: first(c, score=float("nan"))),
    "none": ("score is None, not a finite number", lambda c: first(c, score=None)),
    "of others": ("id is 'x', not '0-", lambda c: first(c, id="x")),
    "mixed up": ("not '0-", lambda c: {**c, "results": c["results"][::-1]}),
    "html": ("not JSON", lambda c: b"<html>Bad gateway</html>"),
    "half": ("not JSON", lambda c: json.dumps(c).encode()[:50]),
    "huge": ("more than 64 MiB", lambda c: b" " * ((64 << 20) + 1)),
    "another reward": ("serves another reward since this run began", lambda c: {**c, "version": "v2"}),
    "an error": (
        "could not score 1 of 2 samples, the first of 'prompt 0': out of memory",
        lambda c: {**c, "results": [{"id": c["results"][0]["id"], "error": "out of memory"}, c["results"][1]]},
    ),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_refused_with_the_address_and_what_to_do(kind):
    said, change = NONSENSE[kind]
    with answering(change) as server, pytest.raises(CorefitError) as raised:
        scored(server, torch.rand(2, 3, 2, 2))
    message = str(raised.value)
    assert said in message
    assert message.startswith(server.url)
    assert "run the same command again, which continues" in message


def test_a_service_that_is_gone_or_slow_is_waited_for_a_bounded_time():
    media = torch.rand(1, 3, 2, 2)
    with answering(seconds=5) as server, pytest.raises(CorefitError, match=r"within 0\.2 s \(tried 2 times"):
        scored(server, media, timeout=0.2, retries=1)
    with answering(hang_up=True) as server, pytest.raises(CorefitError, match=r"cannot be reached .* \(tried 2 times"):
        scored(server, media, retries=1)


def test_a_service_that_comes_back_in_time_is_as_if_it_had_never_been_gone():
    def answer(asked: Asked, number: int) -> Answer:
        return Answer(brightness(asked), status=503 if number == 1 else 200)

    with serving(answer) as server:
        assert scored(server, torch.ones(1, 3, 2, 2), retries=1) == [1.0]


def test_the_token_is_sent_and_not_said(monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", "very-secret-word")

    def answer(asked: Asked, number: int) -> Answer:
        headers = {name.lower(): value for name, value in asked.headers.items()}
        right = headers.get("authorization") == "Bearer very-secret-word"
        return Answer(brightness(asked)) if right else Answer({"detail": headers.get("authorization")}, status=401)

    with serving(answer) as server:
        assert scored(server, torch.ones(1, 3, 2, 2), token_env="REWARD_TOKEN") == [1.0]
        monkeypatch.setenv("REWARD_TOKEN", "another-secret")
        with pytest.raises(CorefitError, match="refuses the token") as raised:
            Remote(url=server.url, token_env="REWARD_TOKEN").check()
        assert "another-secret" not in str(raised.value)
        monkeypatch.delenv("REWARD_TOKEN")
        with pytest.raises(ConfigError, match="'token_env' names the environment variable REWARD_TOKEN"):
            Remote(url=server.url, token_env="REWARD_TOKEN").check()


def test_metadata_that_json_lacks_stop_with_a_sentence():
    with answering() as server, pytest.raises(CorefitError, match="was sent nothing: the metadata of 'a'"):
        Remote(url=server.url).score(torch.ones(1, 3, 2, 2), ["a"], [{"x": object()}])


# in a pipeline

LOCAL = '{ use = "bright", weight = 1.0 }'


def with_remote(project, url: str, keys: str = "") -> None:
    project.swap((LOCAL, f'{{ use = "remote", url = "{url}"{keys} }}'))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("127.0.0.1:8123", "stage.grpo.reward.0.url: must be an address such as"),
        ("http://me:secret@127.0.0.1:8123", "stage.grpo.reward.0: 'url' contains a password"),
        ("http://", "stage.grpo.reward.0.url: must be an address such as"),
    ],
)
def test_check_refuses_a_url_that_is_none(project, url, said):
    with_remote(project, url)
    ended = project.main("check", "pipeline.toml")
    assert ended.status == 2
    assert said in ended.err


def test_check_names_the_key_where_the_service_is_missing_or_another(project):
    with_remote(project, f"http://127.0.0.1:{free_port()}")
    ended = project.main("check", "pipeline.toml")
    assert ended.status == 2
    assert "stage.grpo.reward.remote: http://127.0.0.1" in ended.err
    assert "start the service, or correct 'url'" in ended.err


@pytest.mark.parametrize(
    ("health", "said"),
    [({"status": "ok"}, "is no reward service, format is None"), ({"ready": False}, "is not ready yet")],
)
def test_check_asks_whether_it_is_a_reward_service_and_ready(health, said):
    def answer(asked: Asked, number: int) -> Answer:
        return Answer(health if "status" in health else {**brightness(asked), **health})

    with serving(answer) as server, pytest.raises(CorefitError, match=said):
        Remote(url=server.url).check()


def test_the_version_of_the_service_determines_a_stage_and_its_address_does_not(project):
    versions = {"first": "v1", "moved": "v1", "other": "v2"}
    text, parts, hashes = project.text, {}, {}
    for name, version in versions.items():
        with serving(lambda asked, number, version=version: Answer(brightness(asked, version))) as server:
            project.write(text)
            with_remote(project, server.url, ", timeout = 50" if name == "moved" else "")
            pipeline = read(project.file)
            base = identity.of_base(pipeline)
            found = identity.of_stage(pipeline, pipeline.stage[1], base, "d", "fp32")
            parts[name], hashes[name] = found.parts, found.hash
    assert hashes["first"] == hashes["moved"] != hashes["other"]
    assert identity.differences(parts["first"], parts["other"]) == ["what scores as remote changed"]
