"""What may be written for others to read: no secrets, and no absolute paths, which tell of a machine and its users."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, cast

SECRET = re.compile(r"(^|[_-])(token|secret|password|passwd|credential|auth)s?$|api_?key|access_?key", re.IGNORECASE)
"""Names of keys whose text is for the user alone. `token_env` names a variable, and may be read."""
USER = re.compile(r"(?<=://)[^/@\s]+@")
"""User and password in an address."""
KEY = re.compile(
    r"(?<=[?&])((?:x-amz-|x-goog-)?(?:signature|credential|security-token|algorithm)|googleaccessid|awsaccesskeyid|sig|"
    r"key|[\w-]*(?:token|secret|password|api_?key|access_?key))=[^&\s'\"]*",
    re.IGNORECASE,
)
"""A key in an address, such as the signature of one that was signed for a while."""
PLACE = re.compile(r"(?<![\w.:/\\…])(?:/[\w.+@~-]+){2,}/?|\b[A-Za-z]:\\[\w.\\ -]+")
"""An absolute path within a text."""
TOKEN = re.compile(r"\b(hf_|gh[pousr]_|github_pat_|glpat-|sk-|AKIA)[\w-]{16,}")
"""What tokens of the hub and of other services begin with."""
SHORTEST = 8
"""Characters that the value of a secret variable has at least; a shorter one may be any word."""
SENTENCE = re.compile(r"[:;,] |\n")
"""What no path has: a text that begins with one goes on after it."""
SLASH = re.compile(r"[/\\]")


def is_secret(key: str) -> bool:
    """Return whether the text under a key is a secret, as the key's name tells."""
    return bool(SECRET.search(key))


def without_secrets(value: Any, instead: str | None = None) -> Any:
    """Return nested tables without secrets, or with `instead` in their places."""
    if isinstance(value, dict):
        table = cast(Mapping[str, Any], value)
        hidden = {key for key, inner in table.items() if isinstance(inner, (str, list)) and is_secret(key)}
        kept = {key: without_secrets(inner, instead) for key, inner in table.items() if key not in hidden}
        return kept if instead is None else {key: kept.get(key, instead) for key in table}
    if isinstance(value, (list, tuple)):
        return [without_secrets(inner, instead) for inner in cast(list[Any], value)]
    return without_keys(value) if isinstance(value, str) else value


def without_keys(text: str) -> str:
    """Return a text whose addresses have no user, no password and no key in them."""
    return KEY.sub(lambda found: f"{found[1]}=…", USER.sub("", text))


def without_places(value: Any) -> Any:
    """Return a text, or nested tables, in which "…/name" stands for every absolute path."""
    if isinstance(value, dict):
        return {key: without_places(inner) for key, inner in cast(Mapping[str, Any], value).items()}
    if isinstance(value, (list, tuple)):
        return [without_places(inner) for inner in cast(list[Any], value)]
    return _without_places(value) if isinstance(value, str) else value


def _without_places(text: str) -> str:
    whole = next((kind(text) for kind in (PurePosixPath, PureWindowsPath) if kind(text).is_absolute()), None)
    if whole is not None and len(whole.parts) > 1 and not SENTENCE.search(text):
        return f"…/{whole.name}"
    return PLACE.sub(lambda found: f"…/{SLASH.split(found[0].rstrip('/'))[-1]}", text)


def seen_from(folder: Path, path: str) -> str:
    """Return an absolute path as a file in `folder` names it. A relative one, or one on another drive, stays."""
    if not Path(path).is_absolute():
        return path
    try:
        return os.path.relpath(path, os.path.realpath(folder))
    except ValueError:  # on another drive
        return path


def leaks(text: str) -> list[str]:
    """Return what of a text is not for others to read: absolute paths as they are, secrets by their names."""
    return [*dict.fromkeys(found[0] for found in PLACE.finditer(text)), *tokens(text)]


def tokens(text: str) -> list[str]:
    """Return what secrets a text has: tokens of known services, and values of this process's secret variables."""
    names = [name for name, value in os.environ.items() if is_secret(name) and len(value) >= SHORTEST and value in text]
    known = sorted({f"a token ({found[1]}...)" for found in TOKEN.finditer(text)})
    return [
        *known,
        *(f"the value of {name}" for name in names),
        *(["a user in an address"] if USER.search(text) else []),
    ]
