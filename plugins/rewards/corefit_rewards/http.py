"""Requests to services that score: JSON over HTTP, with a limit on time and size, and a bounded number of retries."""

from __future__ import annotations

import ipaddress
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from attrs import frozen

from corefit.errors import CorefitError, plain, short_repr
from corefit_rewards.packages import require

if TYPE_CHECKING:
    import httpx

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between the first two attempts, and at most; the pause doubles after each attempt."""
LARGEST_ANSWER = 64 * 2**20
"""The number of bytes of an answer at most."""
TRY_AGAIN = frozenset({408, 425, 429})
"""The HTTP statuses, besides 500 to 599, after which the same request may succeed later."""
MEANINGS: Mapping[int, str] = {
    401: "the service refuses the token; set the environment variable that holds it",
    403: "the service refuses the token; set the environment variable that holds it",
    404: "what was asked for is not there; correct 'url', or the name of what is asked for",
    413: "the request is larger than the service accepts; raise its limit, or send fewer or smaller pictures",
}
"""What to do about some statuses that a retry does not change."""

_START = "start the service, or correct 'url'"


class ServiceError(CorefitError):
    """A service that scores cannot be reached, refuses a request, or gives an answer that is no answer."""


@frozen
class _Failure:
    """What went wrong in one attempt. `pause` is how many seconds the service asked to wait, or None."""

    what: str
    remedy: str
    again: bool = True
    pause: float | None = None


def post_json(
    url: str, payload: Any, *, timeout: float, retries: int = 4, headers: Mapping[str, str] | None = None
) -> Any:
    """Post `payload` as JSON to `url`, and return the decoded JSON of the answer.

    A lost connection, a timeout and the statuses 408, 425, 429 and 500 to 599 are tried again, after pauses of 0.5, 1,
    2, ... and at most 30 seconds, or as many seconds as the service asks for with Retry-After, again at most 30.

    Raises ServiceError, whose message names the address without user, password and query, says what happened, and hides
    the values of `headers`.

    timeout  seconds that one attempt may take, from connecting to the last byte
    retries  further attempts after the first
    headers  headers besides those of JSON, such as {"Authorization": "Bearer ..."}
    """
    started = time.monotonic()
    headers = dict(headers or {})
    failure = _Failure("", "")
    for attempt, pause in enumerate(_pauses(retries)):
        found = _attempt("POST", url, json.dumps(payload).encode(), timeout, headers)
        if not isinstance(found, _Failure):
            return found.value
        failure = found
        if not found.again or pause is None:
            tried = f" (tried {attempt + 1} times in {time.monotonic() - started:.0f} s)" if attempt else ""
            what = _without(failure.what, headers.values())
            raise ServiceError(f"{shown(url)} {what}{tried}: {failure.remedy}")
        time.sleep(pause if found.pause is None else min(found.pause, LONGEST_PAUSE))
    raise AssertionError("the last attempt returns or raises")


def get_json(url: str, *, timeout: float = 5.0, headers: Mapping[str, str] | None = None) -> Any:
    """Return the decoded JSON that `url` gives; one attempt. Raises ServiceError like `post_json`."""
    headers = dict(headers or {})
    found = _attempt("GET", url, b"", timeout, headers)
    if isinstance(found, _Failure):
        raise ServiceError(f"{shown(url)} {_without(found.what, headers.values())}: {found.remedy}")
    return found.value


def check_reachable(url: str, *, timeout: float = 5.0, headers: Mapping[str, str] | None = None) -> None:
    """Raise ServiceError unless something answers at `url`, with whatever status but 401 or 403."""
    require("httpx")
    import httpx

    try:
        status = _client(_is_local(url)).get(url, headers=dict(headers or {}), timeout=timeout).status_code
    except httpx.HTTPError as error:
        raise ServiceError(f"{shown(url)} {_lost(error, timeout)}: {_START}") from None
    if status in (401, 403):
        raise ServiceError(f"{shown(url)} answers with status {status}: {MEANINGS[status]}")


def check_url(url: str) -> None:
    """Raise ValueError unless `url` is an http or https address without a password."""
    try:
        parts = urlsplit(url)
        fine, secret = parts.scheme in ("http", "https") and bool(parts.hostname), parts.password is not None
        parts.port  # noqa: B018 - reading it raises ValueError for a port that is no number
    except ValueError:
        fine, secret = False, False
    if secret:
        raise ValueError("'url' contains a password, which would be copied into the run's folder; leave it out")
    if not fine:
        raise ValueError(f"'url' must be an address such as \"http://127.0.0.1:8000\", not {short_repr(url)}")


def shown(url: str) -> str:
    """Return an address as messages show it: without user, password, query and fragment."""
    parts = urlsplit(url)
    return plain(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl())


@frozen
class _Answer:
    value: Any


def _attempt(method: str, url: str, body: bytes, timeout: float, headers: Mapping[str, str]) -> _Answer | _Failure:
    require("httpx")
    import httpx

    sent = {"Content-Type": "application/json", "Accept": "application/json", **headers}
    end = time.monotonic() + timeout
    try:
        with _client(_is_local(url)).stream(method, url, content=body, headers=sent, timeout=timeout) as response:
            content = _received(response, end)
    except httpx.TimeoutException:
        return _Failure(f"did not answer within {timeout:g} s", "raise 'timeout', or give the service less to do")
    except httpx.HTTPError as error:
        return _Failure(_lost(error, timeout), _START)
    if isinstance(content, _Failure):
        return content
    if response.status_code != 200:
        return _refused(response, content)
    try:
        return _Answer(json.loads(content))
    except (ValueError, RecursionError):
        return _Failure(f"answered with {_excerpt(content)}, which is not JSON", "correct 'url'", again=False)


def _received(response: httpx.Response, end: float) -> bytes | _Failure:
    """Return the body of an answer, or the failure of one that is too large or comes too slowly."""
    import httpx

    content = bytearray()
    for part in response.iter_bytes():
        content += part
        if len(content) > LARGEST_ANSWER:
            return _Failure(f"answered with more than {LARGEST_ANSWER // 2**20} MiB", "correct 'url'", again=False)
        if time.monotonic() > end:
            raise httpx.ReadTimeout("the whole answer took too long")
    return bytes(content)


def _refused(response: httpx.Response, content: bytes) -> _Failure:
    """Return the failure of an answer whose status is not 200."""
    status = response.status_code
    again = status in TRY_AGAIN or 500 <= status < 600
    what = f"answered with status {status}" + (f", {_excerpt(content)}" if content.strip() else "")
    remedy = MEANINGS.get(status, "read the service's log" if again else "correct 'url' or what is asked")
    return _Failure(what, remedy, again, _seconds(response.headers.get("Retry-After")))


def _seconds(text: str | None) -> float | None:
    """Read a Retry-After in seconds; None for a date, or for what is no time."""
    try:
        seconds = float(text or "")
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _pauses(retries: int) -> Iterator[float | None]:
    """Yield the pause after each attempt, in seconds; None after the last."""
    for attempt in range(retries):
        yield min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)
    yield None


def _lost(error: Exception, timeout: float) -> str:
    import httpx

    if isinstance(error, httpx.TimeoutException):
        return f"did not answer within {timeout:g} s"
    return f"cannot be reached ({plain(str(error)) or type(error).__name__})"


def _excerpt(content: bytes) -> str:
    return short_repr(" ".join(content[:1000].decode(errors="replace").split()))


def _without(text: str, secrets: Iterable[str]) -> str:
    """Replace header values, and the words in them, wherever a service repeats them."""
    for word in {word for value in secrets for word in value.split() if len(word) > 6}:
        text = text.replace(word, "***")
    return text


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@cache
def _client(local: bool) -> httpx.Client:
    """Return the client that all threads share. Proxies of the environment do not apply to this machine's services."""
    import httpx

    return httpx.Client(trust_env=not local, limits=httpx.Limits(max_connections=None))
