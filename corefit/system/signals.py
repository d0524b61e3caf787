"""Signals that request a stop: a run stops at once, but during training only after the step and its checkpoint.

SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal or the connection is gone) and SIGUSR1 (a scheduler's warning before
its time limit) all mean the same.
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
"""Seconds after a signal in which another one is taken for its echo and ignored.

A Ctrl-C reaches the launcher and its processes alike, and the launcher then passes it on to the processes once more.
"""
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
"""Names of the signals; not every platform has all of them."""


def echo(world: int) -> float:
    """Return ECHO for a process that a launcher has started, alone or as one of several; else 0."""
    return ECHO if world > 1 or "RANK" in os.environ else 0.0


@define(eq=False)
class Signals:
    """Handles the signals of this process: during training the first one requests a stop, the second stops at once.

    say             prints a line
    echo            seconds after a signal in which another one does not count
    stop_requested  whether a signal has requested a stop
    """

    say: Callable[[str], None]
    echo: float = 0.0
    stop_requested: bool = False
    _training: bool = False
    _since: float = 0.0

    @contextmanager
    def handled(self) -> Generator[None]:
        """Within, this object handles the signals; afterwards the former handlers do again."""
        former = {number: signal.signal(number, self._handle) for number in stop_signals()}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    @contextmanager
    def training(self) -> Generator[None]:
        """Within, the first signal only sets `stop_requested`; KeyboardInterrupt is raised at the end if it is set."""
        self._training = True
        try:
            yield
        finally:
            self._training = False
        if self.stop_requested:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if number == getattr(signal, "SIGHUP", None):
            leave_terminal()
        if self.stop_requested and now - self._since < self.echo:
            return
        if self._training and not self.stop_requested:
            self.stop_requested, self._since = True, now
            with suppress(OSError):  # if the terminal is gone, the step and its checkpoint are still due
                self.say("stopping after this step; once more to stop now")
            return
        self.stop_requested, self._since = True, now
        raise KeyboardInterrupt


def stop_signals() -> list[signal.Signals]:
    """List the signals to handle on this platform. SIGHUP is left out where it is ignored, as nohup sets it."""
    every = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    return [n for n in every if n.name != "SIGHUP" or signal.getsignal(n) != signal.SIG_IGN]


def ignore() -> None:
    """Ignore the signals from now on: this process is ending already, with the status that says why."""
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)


def leave_terminal() -> None:
    """Discard what would be printed to a terminal from now on: writing to one that is gone fails."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(null, stream)
    os.close(null)
