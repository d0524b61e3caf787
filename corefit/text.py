"""Text that others wrote, as messages and terminals can take it."""

from __future__ import annotations

import re

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and newline, marks of writing direction, and halves of characters."""
SHOWN = 80
"""Characters of a value in a message."""


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
