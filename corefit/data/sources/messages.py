"""Format lists in error messages."""

from __future__ import annotations

from collections.abc import Sequence

MAX_LINES = 20


def listed(lines: Sequence[str], limit: int = MAX_LINES) -> str:
    """Return the first `limit` lines, indented, and how many more there are."""
    more = [f"... and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n".join(f"  {line}" for line in [*lines[:limit], *more])
