"""What a caption is, wherever it is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

from corefit.errors import is_unicode

SHOWN = 60


def captions(value: Any) -> str | tuple[str, ...]:
    """A text, or a list of one or more; ValueError says what was found instead."""
    if isinstance(value, str):
        return _whole(value)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"is {shown(value)}, expected a string or a list of strings")
    texts = tuple(cast(Sequence[Any], value))
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"is {shown(value)}, expected one or more strings")
    return tuple(map(_whole, texts))


def _whole(text: str) -> str:
    """A text that encoders of text take."""
    if not is_unicode(text):
        raise ValueError(f"is {shown(text)}, with half of a character in it (a lone surrogate); write it anew")
    return text


def shown(value: Any) -> str:
    """A value as JSON writes it, cut short."""
    return json.dumps(value, default=repr)[:SHOWN]
