"""Small JSON files that carry the SHA-256 digest of their own content: their only writer and their only reader."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from corefit.report import write_whole

DIGEST = "digest"
"""The key, beside those of the content, of the content's digest."""


class Damaged(ValueError):
    """A file is not as it was written; the message says how, in a few words, without the file's name."""


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of what the content says, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write(file: Path, content: Mapping[str, Any]) -> None:
    """Replace `file` as a whole by the content and its digest. `content` must not have the key "digest"."""
    assert DIGEST not in content, f"{DIGEST!r} is the digest's own key"
    plain = json.loads(json.dumps(content))
    write_whole(file, json.dumps({**plain, DIGEST: digest(plain)}, indent=1).encode())


def read(file: Path, former: Callable[[Mapping[str, Any]], bool] = lambda content: False) -> dict[str, Any]:
    """Return the content of `file`, without its digest.

    former  says of content without a digest whether it is what corefit wrote before such files had one
    Raises FileNotFoundError, and Damaged.
    """
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise Damaged(f"it cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise Damaged("it is not a JSON object")
    found = content.pop(DIGEST, None)
    if found is None and former(content):
        return content
    if found != digest(content):
        raise Damaged("its content does not have the digest that is in it" if found else "it has no digest")
    return content
