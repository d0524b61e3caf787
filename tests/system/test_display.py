"""What a bar says on a terminal: how far a task is, or that there was nothing to do."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from corefit.system import display
from corefit.system.display import Display


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal of 120 columns shows."""
    shown = io.StringIO()
    monkeypatch.setattr(
        display, "Console", lambda **keys: Console(file=shown, force_terminal=True, width=120, no_color=True, **keys)
    )
    return shown


def last_line(shown: io.StringIO) -> str:
    """The bar as it was drawn last."""
    drawn = re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "\n", shown.getvalue())
    return [line.strip() for line in drawn.splitlines() if line.strip()][-1]


def test_a_task_that_was_cached_says_so(terminal: io.StringIO) -> None:
    with Display.on() as shown, shown.task("encoding data", idle="cached"):
        pass
    line = last_line(terminal)
    assert "encoding data" in line
    assert " cached " in line
    assert "0/?" not in terminal.getvalue()


def test_a_task_shows_how_far_it_is(terminal: io.StringIO) -> None:
    with Display.on() as shown, shown.task("soar") as advance:
        advance(3, 300, {"loss": 0.5})
        advance(300, 300)
    line = last_line(terminal)
    assert " 300/300 " in line
    assert line.endswith("loss 0.5")
    assert "nothing to do" not in line


def test_a_task_that_failed_does_not_say_that_it_was_cached(terminal: io.StringIO) -> None:
    with pytest.raises(OSError, match="disk"), Display.on() as shown, shown.task("encoding data", idle="cached"):
        raise OSError("disk")
    assert "cached" not in terminal.getvalue()


def test_without_a_terminal_only_progress_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with Display.on() as shown:
        with shown.task("encoding data", idle="cached"):
            pass
        with shown.task("soar") as advance:
            advance(2, 2)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("soar: 2/2, ")
