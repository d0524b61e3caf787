"""What a person sees of a run: progress bars on a terminal, a line now and then elsewhere (rich)."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

from attrs import define, field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from corefit.errors import plain

PAUSE = 10.0
"""Seconds between lines where there is no terminal."""


class Advance(Protocol):
    """progress(done, total, metrics)."""

    def __call__(self, done: int, total: int, metrics: Mapping[str, float] = ...) -> None: ...


@define(eq=False)
class Display:
    """Bars with speed and time left. Other ranks than the first have a silent one."""

    console: Console
    _progress: Progress
    _live: bool

    @staticmethod
    def on(shown: bool = True) -> Display:
        console = Console(quiet=not shown, highlight=False)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        live = console.is_terminal and shown
        return Display(console, Progress(*columns, console=console, disable=not live), live)

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(plain(text), markup=False, soft_wrap=True)

    @contextmanager
    def task(self, title: str) -> Generator[Advance]:
        """A bar, or lines, for as long as the block runs."""
        task = self._progress.add_task(plain(title), total=None, note="")
        lines = _Lines(title, self.say if not self._live else lambda text: None)

        def advance(done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
            note = plain(_note(metrics or {}))
            self._progress.update(task, completed=done, total=total)
            if note:
                self._progress.update(task, note=note)
            lines.at(done, total, note)

        try:
            yield advance
        finally:
            self._progress.stop_task(task)


@define
class _Lines:
    """A line every few seconds, and the last."""

    title: str
    say: Callable[[str], None]
    began: float = field(factory=time.monotonic)
    last: float = field(factory=time.monotonic)
    counted: float = 0.0
    """When the first report came; how far things were then is `first`: a resumed stage starts in the middle."""
    first: int = -1
    note: str = ""

    def at(self, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        self.note = note or self.note
        if self.first < 0:
            self.first, self.counted = done, now
        if done < total and now - self.last < PAUSE:
            return
        self.last = now
        left = f", {now - self.began:.0f} s"
        if self.first < done < total:
            left = f", {(total - done) * (now - self.counted) / (done - self.first):.0f} s left"
        self.say(f"{self.title}: {done}/{total}{left}{'  ' if self.note else ''}{self.note}")


SHOWN = ("loss", "reward", "samples_per_second")


def _note(metrics: Mapping[str, float]) -> str:
    """The numbers worth a glance."""
    shown = [name for name in metrics if name.rpartition("/")[2] in SHOWN]
    words = {"samples_per_second": "samples/s"}
    return "  ".join(f"{words.get(name, name)} {metrics[name]:.4g}" for name in shown)
