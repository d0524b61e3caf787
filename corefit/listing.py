"""`corefit plugins`: every offer with its owner, its keys, their types and defaults."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import attrs

from corefit.plugins import KINDS, Host, Offer


def listing(host: Host) -> str:
    """The whole list, as text."""
    return "\n".join(line for kind in KINDS for line in _kind(host, kind))


def _kind(host: Host, kind: str) -> Iterator[str]:
    yield kind.replace("_", " ") + ("" if host.offers[kind] else ": none is installed")
    for name in sorted(host.offers[kind]):
        yield from _offer(host.offers[kind][name])
    yield ""


def _offer(offer: Offer) -> Iterator[str]:
    summary = (inspect.getdoc(offer.cls) or "").partition("\n")[0]
    yield f"  {offer.name}  ({offer.owner})  {summary}".rstrip()
    for field in attrs.fields(offer.cls):
        if field.init:
            yield f"      {field.name}: {_type(field.type)}{_default(field.default)}"


def _type(kind: Any) -> str:
    return kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))


def _default(default: Any) -> str:
    if default is attrs.NOTHING:
        return ", required"
    if isinstance(default, attrs.Factory):  # pyright: ignore[reportArgumentType]
        default = "computed" if default.takes_self else default.factory()
    if default is None:
        return ""
    return f" = {'true' if default is True else 'false' if default is False else repr(default)}"
