"""`corefit schema`: the JSON Schema of pipeline files, made from the installed plugins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import attrs

from corefit.pipeline.pipeline import CHOICES, Pipeline
from corefit.pipeline.reader import TABLE, fields_of_other_tables
from corefit.plugins.host import Host
from corefit.plugins.kinds import BY_PROTOCOL
from corefit.types import ModelPath, Weighted
from corefit.types.objective import Sum

DIALECT = "https://json-schema.org/draft/2020-12/schema"
PLAIN: Mapping[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string"}
Schema = dict[str, Any]


def schema(host: Host) -> Schema:
    """Return the JSON Schema of a pipeline file, by which an editor completes and checks it."""
    whole = _Writer(host).table(Pipeline)
    for field in fields_of_other_tables(Pipeline):
        key = whole["properties"].pop(field.name)
        for table in whole["properties"][field.metadata[TABLE]]["anyOf"]:
            table["properties"][field.name] = key
    return {"$schema": DIALECT, "title": "corefit pipeline", **whole}


@attrs.frozen
class _Writer:
    host: Host

    def table(self, cls: type[Any], use: str | None = None) -> Schema:
        """Return the schema of an attrs class; `use` is its name, if a table chooses it with `use`."""
        attrs.resolve_types(cls, include_extras=True)
        fields = [f for f in attrs.fields(cls) if f.init]
        properties = {f.name: self.of(f.type) | _default(f.default) for f in fields}
        required = [f.name for f in fields if f.default is attrs.NOTHING]
        if use is not None:
            properties, required = {"use": {"const": use}, **properties}, ["use", *required]
        description = next(iter((cls.__doc__ or "").splitlines()), "")
        return {
            "type": "object",
            **({"description": description} if description else {}),
            "properties": properties,
            "additionalProperties": False,
            **({"required": required} if required else {}),
        }

    def of(self, kind: Any) -> Schema:
        """Return the schema of a field's type."""
        choices = next((classes for known, classes in CHOICES.items() if known == kind), None)
        if choices:
            return {"anyOf": [self.table(cls, use) for use, cls in choices.items()]}
        if get_origin(kind) in (Union, UnionType):
            inner = [arg for arg in get_args(kind) if arg is not NoneType]
            return self.of(inner[0]) if len(inner) == 1 else {"anyOf": [self.of(arg) for arg in inner]}
        return self._one(kind)

    def _one(self, kind: Any) -> Schema:
        origin = get_origin(kind)
        if origin is Literal:
            return {"enum": list(get_args(kind))}
        if origin in (tuple, list, Sequence):
            return _list(get_args(kind), self.of)
        if kind is ModelPath:
            return {"type": "string"}
        if origin is Weighted:
            (plugin,) = get_args(kind)
            return self._weighted(BY_PROTOCOL[get_origin(plugin) or plugin].key)
        if (origin or kind) in BY_PROTOCOL:
            offers = self.host.offers[BY_PROTOCOL[origin or kind].key]
            return {"anyOf": [self.table(offers[name].cls, name) for name in sorted(offers)]}
        if attrs.has(kind):
            return self.table(kind)
        return {"type": PLAIN[kind]} if kind in PLAIN else {}

    def _weighted(self, kind: str) -> Schema:
        """Return the schema of any plugin of a kind with a `weight` beside its keys. A sum may not hold a sum."""
        offers = {name: offer.cls for name, offer in sorted(self.host.offers[kind].items()) if offer.cls is not Sum}
        tables = [self.table(cls, name) for name, cls in offers.items()]
        for table in tables:
            table["properties"]["weight"] = {"type": "number", "default": 1.0}
        return {"anyOf": tables or [{}]}


def _list(kinds: Sequence[Any], of: Any) -> Schema:
    if (len(kinds) == 2 and kinds[1] is Ellipsis) or len(kinds) == 1:
        return {"type": "array", "items": of(kinds[0])}
    return {
        "type": "array",
        "prefixItems": [of(kind) for kind in kinds],
        "minItems": len(kinds),
        "maxItems": len(kinds),
    }


def _default(default: Any) -> Schema:
    """Return the `default` entry of a key, if its default is a value that JSON has."""
    plain = isinstance(default, (bool, int, float, str))
    return {"default": default} if plain else {}
