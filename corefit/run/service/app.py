"""The HTTP side of a reward service: GET /health and POST /score, with limits and a token."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

from attrs import define, field, frozen
from fastapi import FastAPI, HTTPException, Request, Response

from corefit.run.service.waiting import Line
from corefit.types import wire
from corefit.types.wire import Answer, Health, Result, Sample

READING = 8
"""How many requests are read at the same time; more wait unread, so that they take no memory."""
BODY_SECONDS = 60.0
"""Seconds in which a request must have arrived."""
JSON = "application/json"


@frozen(kw_only=True)
class Limits:
    """What a request may be at most.

    size     bytes, and pixels of all its pictures together
    samples  samples in one request
    """

    size: int
    samples: int


@define(eq=False)
class Counts:
    """What the service has done since it started."""

    requests: int = 0
    scores: int = 0
    errors: int = 0

    def add(self, results: Sequence[Result]) -> None:
        self.requests += 1
        self.errors += sum(one.score is None for one in results)
        self.scores += sum(one.score is not None for one in results)


@define(eq=False, kw_only=True)
class Service:
    """Answers requests.

    token  what a client must send as `Authorization: Bearer TOKEN`, or "" if nothing is asked for
    """

    line: Line
    health: Health
    limits: Limits
    token: str = ""
    counts: Counts = field(init=False, factory=Counts)
    _reading: asyncio.Semaphore = field(init=False, factory=lambda: asyncio.Semaphore(READING))

    def app(self) -> FastAPI:
        """Return the application for the server."""
        app = FastAPI(title="corefit reward", docs_url=None, redoc_url=None, openapi_url=None, lifespan=self._working)
        app.add_api_route("/health", self._tell_health, methods=["GET"])
        app.add_api_route("/score", self._score, methods=["POST"])
        return app

    @asynccontextmanager
    async def _working(self, app: FastAPI) -> AsyncGenerator[None]:
        work = asyncio.create_task(self.line.work())
        yield
        work.cancel()

    async def _tell_health(self, request: Request) -> Response:
        self._check_token(request)
        return Response(wire.write_health(self.health), media_type=JSON)

    async def _score(self, request: Request) -> Response:
        self._check_token(request)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
            raise HTTPException(415, f"send {JSON}")  # web pages of other hosts cannot send this type unasked
        async with self._reading:
            read = await self._read(request)
            good = [one for one in read if isinstance(one, Sample)]
            scored = await self.line.results(good, request.is_disconnected) if good else []
        found = {one.id: one for one in [*scored, *(one for one in read if isinstance(one, Result))]}
        if len(found) < len(read):  # the client has hung up, and nobody reads this
            return Response(status_code=499)
        results = [found[one.id] for one in read]
        self.counts.add(results)
        return Response(wire.write_answer(Answer(self.health.version, results)), media_type=JSON)

    def _check_token(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1", "replace")
        if self.token and not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
            raise HTTPException(401, "the token is missing or another one", {"WWW-Authenticate": "Bearer"})

    async def _read(self, request: Request) -> list[Sample | Result]:
        try:
            body = await asyncio.wait_for(self._body(request), BODY_SECONDS)
        except TimeoutError:
            raise HTTPException(408, f"the request took longer than {BODY_SECONDS:g} seconds to arrive") from None
        try:
            read = await asyncio.to_thread(wire.read_request, body, self.limits.size)
        except wire.Malformed as error:
            raise HTTPException(400, str(error)) from None
        if len(read) > self.limits.samples:
            raise HTTPException(413, f"{len(read)} samples are more than {self.limits.samples} in one request")
        return read

    async def _body(self, request: Request) -> bytes:
        """Read a request. One that is too large is read as well, unless it is huge: its client would not see why."""
        body, size = bytearray(), 0
        async for part in request.stream():
            size += len(part)
            if size <= self.limits.size:
                body += part
            elif size > 16 * self.limits.size:
                break
        if size > self.limits.size:
            raise HTTPException(413, f"the request is larger than {self.limits.size >> 20} MiB")
        return bytes(body)
