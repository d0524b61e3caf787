"""What a user can get wrong, and how messages show text. The command line prints a message and exits with 2."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and newline, marks of writing direction, and halves of characters."""
SHOWN = 80
"""Characters of a value in a message."""


class CorefitError(ValueError):
    """Something outside the code is wrong: the message names the key or file and says what to do."""


class PluginError(CorefitError):
    """A plugin that cannot be used: broken import, misspelt hook, clash, an offer of the wrong kind."""


class ConfigError(CorefitError):
    """A pipeline that cannot run."""


class DataError(CorefitError):
    """Media, prompts or caches that are missing, damaged or contradictory."""


class ModelError(CorefitError):
    """A checkpoint folder that is missing, incomplete or of another family."""


class TrainingError(CorefitError):
    """A stage that had to stop before weights were spoilt."""


class NonFinite(TrainingError):
    """A loss, gradient or reward that is not finite.

    An objective raises it from `experience`, on every rank alike (ask `ctx.gather` first): the trainer then
    stops, or skips the batch where the stage says on_nan = "skip".
    """


class RankError(CorefitError):
    """Another process of the run stopped, so this one does."""


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop; the checkpoint of `step` is written."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


def plain(text: str) -> str:
    """`text` as it may go to a terminal: what would move a cursor, color or reorder it is written out, as \\x1b."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shown(value: object) -> str:
    """A value as Python writes it, cut short."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # of tables inside tables, and of numbers that Python does not write out
        return f"a {type(value).__name__} that is too deep or too large to show"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def is_unicode(text: str) -> bool:
    """Whether no character is the half of a pair (a lone surrogate), which JSON can name and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def near(word: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' for the closest known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
