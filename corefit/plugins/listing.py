"""The text of `corefit plugins`, which lists every offer with its owner, its keys, their types and defaults."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import attrs

from corefit.plugins.host import HOOKS, Host, Offer
from corefit.plugins.kinds import KINDS
from corefit.types import key_of

MODULES = re.compile(r"(?<!['\w.])(\w+\.)+(?=\w)")


def listing(host: Host) -> str:
    """Return the whole list as text."""
    return "\n".join([*(line for kind in KINDS for line in _kind(host, kind)), *_hooks(host)])


def _kind(host: Host, kind: str) -> Iterator[str]:
    yield kind.replace("_", " ") + ("" if host.offers[kind] else ": none is installed")
    for name in sorted(host.offers[kind]):
        yield from _offer(host.offers[kind][name])
    yield ""


def _hooks(host: Host) -> Iterator[str]:
    yield "hooks that observe"
    for hook in HOOKS:
        if hook.removeprefix("corefit_") not in KINDS:
            names = sorted(each.plugin_name for each in getattr(host.hook, hook).get_hookimpls())
            yield f"  {hook}: {', '.join(names) or 'nobody'}"


def _offer(offer: Offer) -> Iterator[str]:
    summary = (inspect.getdoc(offer.cls) or "").partition("\n")[0]
    yield f"  {offer.name}  ({offer.owner})  {summary}".rstrip()
    attrs.resolve_types(offer.cls)
    for field in attrs.fields(offer.cls):
        if field.init:
            yield f"      {key_of(field.name)}: {_type(field.type)}{_default(field.default)}"


def _type(kind: Any) -> str:
    """Return a resolved annotation, without names of modules."""
    if isinstance(kind, str):
        return kind
    return kind.__name__ if isinstance(kind, type) else MODULES.sub("", str(kind))


def _default(default: Any) -> str:
    if default is attrs.NOTHING:
        return ", required"
    if isinstance(default, attrs.Factory):  # pyright: ignore[reportArgumentType]
        if default.takes_self:
            return ", computed"
        default = default.factory()
    if default is None:
        return ""
    return f" = {'true' if default is True else 'false' if default is False else repr(default)}"
