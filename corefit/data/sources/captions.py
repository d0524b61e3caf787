"""Check the captions of an example, whichever source they come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

from corefit.errors import is_unicode

LONGEST = 60
"""Characters of a value that a message shows."""


def parse_captions(value: Any) -> str | tuple[str, ...]:
    """Return a caption, or several as a tuple; ValueError for anything but a string or a list of strings."""
    if isinstance(value, str):
        return _check_unicode(value)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"is {as_json(value)}, expected a string or a list of strings")
    texts = tuple(cast(Sequence[Any], value))
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"is {as_json(value)}, expected one or more strings")
    return tuple(map(_check_unicode, texts))


def _check_unicode(text: str) -> str:
    """Return `text`; ValueError if it is not valid Unicode, which no tokenizer takes."""
    if not is_unicode(text):
        raise ValueError(f"is {as_json(text)}, with half of a character in it (a lone surrogate); correct the text")
    return text


def as_json(value: Any) -> str:
    """Return a value as JSON, cut to LONGEST characters."""
    return json.dumps(value, default=repr)[:LONGEST]
