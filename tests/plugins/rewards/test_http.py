"""Requests to services: what is tried again, how often and when, and what the messages say and hide."""

from __future__ import annotations

import re
import socket
import threading
import time

import pytest
from serving import Answer, serving

from corefit_rewards import http
from corefit_rewards.http import ServiceError, check_reachable, check_url, post_json

SECRET = {"Authorization": "Bearer sk-very-secret-0123"}


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, which are noted and not made."""
    made: list[float] = []
    monkeypatch.setattr(http.time, "sleep", made.append)
    return made


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_json_goes_and_comes():
    with serving(lambda asked, number: Answer({"twice": asked.body["n"] * 2})) as server:
        assert post_json(f"{server.url}/score", {"n": 21}, timeout=5, headers=SECRET) == {"twice": 42}
    assert server.asked[0].path == "/score"
    assert server.asked[0].headers["Authorization"] == SECRET["Authorization"]
    assert server.asked[0].headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_what_may_pass_is_tried_again(status: int, pauses: list[float]):
    with serving(lambda asked, number: Answer("late", status) if number < 2 else Answer("fine")) as server:
        assert post_json(server.url, {}, timeout=5, retries=2) == "fine"
    assert len(server.asked) == 3
    assert pauses == [0.5, 1.0]


@pytest.mark.parametrize("status", [301, 400, 401, 404, 413, 422])
def test_what_does_not_pass_is_not_tried_again(status: int, pauses: list[float]):
    with (
        serving(lambda asked, number: Answer({"error": "no"}, status)) as server,
        pytest.raises(ServiceError, match=f"status {status}.*no"),
    ):
        post_json(server.url, {}, timeout=5)
    assert len(server.asked) == 1
    assert pauses == []


def test_retries_are_bounded_and_pauses_grow_to_a_limit(pauses: list[float]):
    with serving(lambda asked, number: Answer("overloaded", 503)) as server, pytest.raises(ServiceError) as caught:
        post_json(f"{server.url}/score", {}, timeout=5, retries=8)
    assert len(server.asked) == 9
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert re.fullmatch(
        rf"{server.url}/score answered with status 503, '\"overloaded\"' \(tried 9 times in \d+ s\): "
        "read the service's log",
        str(caught.value),
    )


@pytest.mark.parametrize(
    ("said", "waited"), [("7", 7), ("0", 0), ("1e9", 30), ("soon", 0.5), ("-3", 0.5), ("nan", 0.5)]
)
def test_retry_after_is_heard_within_bounds(said: str, waited: float, pauses: list[float]):
    with serving(lambda a, n: Answer("", 429, {"Retry-After": said}) if n == 0 else Answer(1)) as server:
        assert post_json(server.url, {}, timeout=5) == 1
    assert pauses == [waited]


def test_no_service_is_said_with_what_to_do(pauses: list[float]):
    url = f"http://127.0.0.1:{closed_port()}/score"
    with pytest.raises(ServiceError, match=rf"^{url} cannot be reached \(.*\) \(tried 3 times.*start the service"):
        post_json(url, {}, timeout=5, retries=2)
    assert pauses == [0.5, 1.0]


def test_a_service_that_comes_back_is_used(pauses: list[float]):
    with serving(lambda asked, number: Answer(hang_up=True) if number == 0 else Answer("back")) as server:
        assert post_json(server.url, {}, timeout=5) == "back"
    assert len(server.asked) == 2


def test_a_slow_service_is_given_up():
    with serving(lambda asked, number: Answer("late", seconds=5)) as server:
        started = time.monotonic()
        with pytest.raises(ServiceError, match=r"did not answer within 0.2 s \(tried 2 times.*raise 'timeout'"):
            post_json(server.url, {}, timeout=0.2, retries=1)
    assert time.monotonic() - started < 3
    assert len(server.asked) == 2


def test_a_trickle_is_given_up(monkeypatch: pytest.MonkeyPatch):
    """Each read is in time, the whole is not."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setattr(http.time, "sleep", lambda seconds: None)

        def trickle() -> None:
            connection, _ = listening.accept()
            connection.recv(10_000)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n")
            for _ in range(100):
                try:
                    connection.sendall(b" ")
                except OSError:
                    return
                threading.Event().wait(0.02)

        threading.Thread(target=trickle, daemon=True).start()
        with pytest.raises(ServiceError, match=r"did not answer within 0\.3 s"):
            post_json(f"http://127.0.0.1:{listening.getsockname()[1]}", {}, timeout=0.3, retries=0)


@pytest.mark.parametrize("body", [b"<html>welcome</html>", b"", b"\xff\xfe", b"[" * 100_000])
def test_nonsense_is_no_answer(body: bytes):
    with serving(lambda asked, number: Answer(body)) as server, pytest.raises(ServiceError, match="is not JSON"):
        post_json(server.url, {}, timeout=5)
    assert len(server.asked) == 1


def test_a_flood_is_cut(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http, "LARGEST_ANSWER", 2**20)
    with (
        serving(lambda asked, number: Answer(b" " * 2**22)) as server,
        pytest.raises(ServiceError, match="more than 1 MiB"),
    ):
        post_json(server.url, {}, timeout=5)


def test_no_secret_is_in_a_message():
    def repeats(asked, number):
        return Answer(f"wrong key {asked.headers['Authorization']}", 401)

    with serving(repeats) as server, pytest.raises(ServiceError) as caught:
        post_json(server.url + "/score?token=abc", {}, timeout=5, headers=SECRET)
    said = str(caught.value)
    assert "wrong key *** ***" in said or "wrong key Bearer ***" in said
    assert "sk-very" not in said
    assert "abc" not in said
    assert http.shown("http://me:word@host:80/v1?token=abc#x") == "http://host:80/v1"
    assert "refuses the token" in said


def test_reachable():
    with serving(lambda asked, number: Answer("?", 404)) as server:
        check_reachable(server.url)
    with (
        serving(lambda asked, number: Answer("?", 401)) as server,
        pytest.raises(ServiceError, match="refuses the token"),
    ):
        check_reachable(server.url)
    with pytest.raises(ServiceError, match=r"cannot be reached.*start the service"):
        check_reachable(f"http://127.0.0.1:{closed_port()}")


def test_proxies_are_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{closed_port()}")
    http._client.cache_clear()
    with serving(lambda asked, number: Answer(1)) as server:
        assert post_json(server.url, {}, timeout=5) == 1
    http._client.cache_clear()


@pytest.mark.parametrize("url", ["localhost:8000", "", "ftp://here", "http://", "http://a:b", "https://me:secret@here"])
def test_wrong_addresses_are_refused(url: str):
    with pytest.raises(ValueError, match="'url'") as caught:
        check_url(url)
    assert "secret" not in str(caught.value)


def test_right_addresses_are_not():
    for url in ("http://127.0.0.1:8000", "https://api.example.com/v1", "http://[::1]:80/x"):
        check_url(url)
