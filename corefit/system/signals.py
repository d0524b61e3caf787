"""Signals that ask for an end: a run ends at once, but in training only after the step and its checkpoint.

SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal or the connection is gone) and SIGUSR1 (a scheduler's warning before
its limit) mean the same.
"""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress

from attrs import define

ECHO = 3.0
"""Seconds in which a signal is taken for the first one's echo: a launcher passes on what the terminal sent to all."""
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
"""Not every platform has all of them."""


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
        """The signals come here for a while."""
        former = {number: signal.signal(number, self._note) for number in heard()}
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
        if number == getattr(signal, "SIGHUP", None):
            leave_terminal()
        if self.asked and now - self._since < self.echo:
            return
        if self._training and not self.asked:
            self.asked, self._since = True, now
            with suppress(OSError):  # nobody reads it any more, and the step and its checkpoint are still due
                self.say("stopping after this step; once more to stop now")
            return
        self.asked, self._since = True, now
        raise KeyboardInterrupt


def heard() -> list[signal.Signals]:
    """The signals of this platform that ask for an end; a SIGHUP that is ignored, as nohup has it, stays ignored."""
    every = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    return [n for n in every if n.name != "SIGHUP" or signal.getsignal(n) != signal.SIG_IGN]


def ignore() -> None:
    """Take no notice of signals any more: this process has been stopped, and is ending with the status that says so."""
    for number in heard():
        signal.signal(number, signal.SIG_IGN)


def leave_terminal() -> None:
    """Send what is printed from now on nowhere, where it went to a terminal: writing to one that is gone fails."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(nowhere, stream)
    os.close(nowhere)
