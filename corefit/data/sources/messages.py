"""How errors list what is wrong."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 20


def listed(lines: Sequence[str], shown: int = SHOWN) -> str:
    """The first lines, indented, and how many more there are."""
    more = [f"... and {len(lines) - shown} more"] if len(lines) > shown else []
    return "\n".join(f"  {line}" for line in [*lines[:shown], *more])
