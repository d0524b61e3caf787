"""SIGINT and SIGTERM: they end a run at once, but in training only after the step and its checkpoint."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from attrs import define

ECHO = 3.0
"""Seconds in which a signal is taken for the first one's echo: a launcher passes on what the terminal sent to all."""


@define(eq=False)
class Signals:
    """What this process was asked to do. A second request in training ends it at once."""

    say: Callable[[str], None]
    echo: float = 0.0
    asked: bool = False
    _training: bool = False
    _since: float = 0.0

    @contextmanager
    def handled(self) -> Generator[None]:
        """Both signals come here for a while."""
        former = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    @contextmanager
    def training(self) -> Generator[None]:
        """A signal sets `asked`; if nobody has stopped for it by the end, the run stops then."""
        self._training = True
        try:
            yield
        finally:
            self._training = False
        if self.asked:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.asked and now - self._since < self.echo:
            return
        if self._training and not self.asked:
            self.say("stopping after this step; once more to stop now")
            self.asked, self._since = True, now
            return
        self.asked, self._since = True, now
        raise KeyboardInterrupt
