"""What others wrote reaches a terminal as text, and a message as a few words."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from corefit.errors import is_unicode, plain, short_repr
from corefit.system.display import Display


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a sky\tat\nnight, ünd 空", "a sky\tat\nnight, ünd 空"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x9b2J", "\\x9b2J"),
        ("over\rwritten\b", "over\\rwritten\\x08"),
        ("\u202etxt.exe", "\\u202etxt.exe"),
        ("\udcff", "\\udcff"),
    ],
)
def test_control_characters_are_written_out(text, written):
    assert plain(text) == written


def test_values_are_cut_short():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert short_repr("a") == "'a'"
    assert short_repr("a" * 200) == f"'{'a' * 79}..."
    assert short_repr(deep) == "a list that is too deep or too large to show"
    assert short_repr(10**5000) == "a int that is too deep or too large to show"
    while deep:
        (deep,) = deep  # from the outside in: freed at once, so many would end the process


def test_halves_of_characters():
    assert is_unicode("空 \U0001f600")
    assert not is_unicode("\ud83d")


@pytest.mark.parametrize("live", [True, False])
def test_progress_shows_no_escapes_and_no_markup(live, monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(
        "corefit.system.display.Console",
        lambda **_: Console(file=file, force_terminal=live, width=200, highlight=False),
    )
    monkeypatch.setattr("corefit.system.display.PAUSE", 0.0)
    with Display.on() as display:
        display.print("said \x1b[2J")
        with display.task("title \x1b[5m") as progress:
            progress(1, 2, {"\x1b[31m[red]/loss": 1.0})
    said = file.getvalue()
    assert not {"\x1b[2J", "\x1b[5m"} & set(said.split())
    assert "\x1b[5m" not in said
    assert "said \\x1b[2J" in said
    assert "title \\x1b[5m" in said
    assert "\\x1b[31m[red]/loss 1" in said
