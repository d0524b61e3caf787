"""Errors that a user can cause, and helpers that format their messages.

The command line prints the message of a CorefitError without a traceback and exits with status 2.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and newline, marks that change the writing direction, and lone surrogates."""
LONGEST_REPR = 80
"""A message shows at most this many characters of a value."""


class CorefitError(ValueError):
    """Something outside corefit's code is wrong. The message names the key or file and says what to do."""


class PluginError(CorefitError):
    """A plugin cannot be used: its import fails, a hook is misspelled, names clash, or an offer is not of its kind."""


class ConfigError(CorefitError):
    """A pipeline cannot run as it is written."""


class DataError(CorefitError):
    """Media, prompts or caches are missing, damaged or contradictory."""


class Unreachable(DataError):
    """A store of raw data cannot be read now, which says nothing about the data: never a reason to leave any out."""


class ModelError(CorefitError):
    """A checkpoint folder is missing, incomplete or of another model family."""


class TrainingError(CorefitError):
    """A stage had to stop before its weights were spoiled."""


class OutOfMemory(TrainingError):
    """Memory ran out, of the device or of the machine."""


class NonFinite(TrainingError):
    """A loss, gradient or reward is not finite.

    An objective may raise it from `experience`, and must then do so on every rank (`ctx.gather` tells it about the
    others). The trainer stops, or skips the batch if the stage has on_nan = "skip".
    """


class RankError(CorefitError):
    """This process stops because another process of the run has stopped."""


class Stopped(KeyboardInterrupt):
    """A signal stopped the run; the checkpoint of `step` is written."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


def plain(text: str) -> str:
    """Escape, as \\x1b, the characters of `text` that would move a terminal's cursor, or color or reorder the text."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def short_repr(value: object) -> str:
    """Return the repr of a value, cut to LONGEST_REPR characters."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # deeply nested tables, and integers too long for Python to print
        return f"a {type(value).__name__} that is too deep or too large to show"
    return text if len(text) <= LONGEST_REPR else f"{text[:LONGEST_REPR]}..."


def is_unicode(text: str) -> bool:
    """Return whether `text` has no lone surrogate, which JSON can escape and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def near(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean ...?)" with the closest known word, or "" if none is close."""
    close = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def counted(number: int, noun: str) -> str:
    """Return "1 step" or "2 steps"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
