"""The [card] table of a pipeline: what the model cards of its stages say that a run cannot know."""

from __future__ import annotations

from typing import Any

import attrs
from attrs import field, frozen, validators

HUB_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
"""A name on the hub: organization/model."""


def _one_line(_: object, attribute: attrs.Attribute[Any], value: str | tuple[str, ...]) -> None:
    for text in [value] if isinstance(value, str) else value:
        if not text.strip() or len(text.splitlines()) > 1:
            raise ValueError(f"{attribute.name!r} must be one line of text that is not empty, not {text!r}")


@frozen(kw_only=True)
class Card:
    """What the model card (README.md) of every stage says beside what the run knows. No weights depend on it."""

    title: str | None = field(default=None, validator=validators.optional(_one_line))
    """The title of the card, and of a LoRA in programs that list them; by default the names of the run and the
    stage."""
    license: str | None = field(
        default=None, validator=validators.optional(validators.matches_re(r"[A-Za-z0-9][A-Za-z0-9.+-]*"))
    )
    """The license's identifier on the hub, such as "apache-2.0" or "other"; by default the one in the base's own
    README.md. Where neither says it, the card says that it is not known."""
    tags: tuple[str, ...] = field(default=(), converter=tuple, validator=_one_line)
    """Tags beside those that every card has."""
    author: str | None = field(default=None, validator=validators.optional(_one_line))
    """Who made the model."""
    base_model: str | None = field(default=None, validator=validators.optional(validators.matches_re(HUB_NAME)))
    """The name of the base on the hub, where `path` of `[backbone]` is a folder."""
