"""What a run prints: progress bars on a terminal, and elsewhere a line every few seconds (rich)."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

from attrs import define, field
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from corefit.errors import plain

PAUSE = 10.0
"""Seconds between lines where there is no terminal."""


class Advance(Protocol):
    """Called as progress(done, total, metrics) whenever a task has advanced."""

    def __call__(self, done: int, total: int, metrics: Mapping[str, float] = ...) -> None: ...


@define(eq=False)
class Display:
    """Prints lines, and a bar for each task with its speed and time left; on ranks other than 0 it is silent."""

    console: Console
    _progress: Progress
    _live: bool

    @staticmethod
    def on(visible: bool = True) -> Display:
        """Make a display on standard output, or a silent one."""
        console = Console(quiet=not visible, highlight=False)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[count]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        live = console.is_terminal and visible
        return Display(console, Progress(*columns, console=console, disable=not live), live)

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()

    def print(self, text: str) -> None:
        """Print a line."""
        self.console.print(plain(text), markup=False, soft_wrap=True)

    @contextmanager
    def task(self, title: str, idle: str = "nothing to do") -> Generator[Advance]:
        """Show a bar, or print lines, for as long as the block runs; it reports its progress to what is yielded.

        idle  what the bar says in the end if the block has reported nothing
        """
        task = self._progress.add_task(plain(title), total=None, note="", count="")
        lines = _Lines(title, self.print if not self._live else lambda text: None)

        def advance(done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
            note = plain(_note(metrics or {}))
            self._progress.update(task, completed=done, total=total, count=f"{done:{len(str(total))}}/{total}")
            if note:
                self._progress.update(task, note=note)
            lines.advance(done, total, note)

        try:
            yield advance
            if lines.done_at_start < 0:
                self._progress.update(task, completed=1, total=1, count=idle)
        finally:
            self._progress.stop_task(task)


@define
class _Lines:
    """Prints a task's progress as a line every PAUSE seconds, and once at its end.

    began             when the task began
    printed           when the last line was printed
    done_at_start     how much was done at the first report, and when that came (reported): a resumed stage starts in
                      the middle, so the time left is computed from there
    """

    title: str
    say: Callable[[str], None]
    began: float = field(factory=time.monotonic)
    printed: float = field(factory=time.monotonic)
    reported: float = 0.0
    done_at_start: int = -1
    note: str = ""

    def advance(self, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        self.note = note or self.note
        if self.done_at_start < 0:
            self.done_at_start, self.reported = done, now
        if done < total and now - self.printed < PAUSE:
            return
        self.printed = now
        left = f", {now - self.began:.0f} s"
        if self.done_at_start < done < total:
            left = f", {(total - done) * (now - self.reported) / (done - self.done_at_start):.0f} s left"
        self.say(f"{self.title}: {done}/{total}{left}{'  ' if self.note else ''}{self.note}")


NOTED = ("loss", "reward", "samples_per_second")
"""Metrics that stand beside a task's progress."""


def _note(metrics: Mapping[str, float]) -> str:
    """Write the metrics that are NOTED in one line."""
    names = [name for name in metrics if name.rpartition("/")[2] in NOTED]
    labels = {"samples_per_second": "samples/s"}
    return "  ".join(f"{labels.get(name, name)} {metrics[name]:.4g}" for name in names)
