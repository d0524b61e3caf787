"""Requests wait for the reward, which one thread calls; those that wait may be scored together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any

from attrs import define, field, frozen

from corefit.types.wire import Result, Sample

Score = Callable[[Sequence[Sample]], Sequence[Result]]


@frozen(eq=False)
class Waiting:
    """The samples of a request whose turn has not come, and what receives their results."""

    samples: Sequence[Sample]
    gone: Callable[[], Awaitable[bool]]
    """Tells whether the client has hung up, so that nobody would read the results."""
    results: asyncio.Future[Sequence[Result]]


@define(eq=False)
class Line:
    """The requests that wait, first come, first served.

    score  scores samples; it is always called in the same thread
    batch  the number of samples up to which waiting requests are scored in one call; with 0 each request is scored by
           itself, so that its scores do not depend on who else asks, not even by rounding
    """

    score: Score
    batch: int = 0
    _waiting: deque[Waiting] = field(init=False, factory=deque[Waiting])
    _arrived: asyncio.Event = field(init=False, factory=asyncio.Event)

    async def results(self, samples: Sequence[Sample], gone: Callable[[], Awaitable[bool]]) -> Sequence[Result]:
        """Wait for the results of a request's samples; there are none if its client is gone before its turn."""
        one = Waiting(samples, gone, asyncio.get_running_loop().create_future())
        self._waiting.append(one)
        self._arrived.set()
        return await one.results

    async def work(self) -> None:
        """Score what arrives, until this task is cancelled."""
        thread = _ScoringThread(self.score)
        while True:
            await self._arrived.wait()
            if together := await self._next():
                results = await thread.call([sample for one in together for sample in one.samples])
                for one in together:
                    _answer(one, results[: len(one.samples)])
                    results = results[len(one.samples) :]

    async def _next(self) -> list[Waiting]:
        """Take the requests that are scored next off the line."""
        taken: list[Waiting] = []
        count = 0
        while self._waiting and (not taken or count + len(self._waiting[0].samples) <= self.batch):
            one = self._waiting.popleft()
            if await one.gone():
                _answer(one, [])
            else:
                taken.append(one)
                count += len(one.samples)
        if not self._waiting:
            self._arrived.clear()
        return taken


def _answer(one: Waiting, results: Sequence[Result]) -> None:
    if not one.results.done():  # it is, where the server cancelled the request because it is stopping
        one.results.set_result(results)


class _ScoringThread:
    """One thread that scores, since rewards need not be safe to call from several. It does not keep a process alive."""

    def __init__(self, score: Score) -> None:
        self._score = score
        self._calls: SimpleQueue[tuple[Sequence[Sample], asyncio.Future[Any]]] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        Thread(target=self._run, name="scoring", daemon=True).start()

    async def call(self, samples: Sequence[Sample]) -> Sequence[Result]:
        future: asyncio.Future[Any] = self._loop.create_future()
        self._calls.put((samples, future))
        return await future

    def _run(self) -> None:
        while True:
            samples, future = self._calls.get()
            try:
                results = self._score(samples)
            except BaseException as error:  # without results the clients would wait until they give up
                results = [Result(one.id, error=f"{type(error).__name__}: {error}") for one in samples]
            self._loop.call_soon_threadsafe(future.set_result, results)
