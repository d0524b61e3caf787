"""Names that members of plugins had in version 0.1: classes that still write them go on working."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

FORMER: Mapping[str, str] = {"moved": "from_saved", "rows_per_prompt": "group_size"}
"""Former name -> today's, of members that plugins write."""


def adopt(cls: type[Any]) -> None:
    """Give a class that writes a member under its former name the member under today's, unless it writes that too."""
    own = {**vars(cls).get("__annotations__", {}), **vars(cls)}
    for former, name in FORMER.items():
        if former in own and name not in own:
            member = own[former]
            setattr(cls, name, member if callable(member) else property(attrgetter(former)))
