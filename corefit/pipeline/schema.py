"""`corefit schema`: what a pipeline file may say, as JSON Schema, from the installed plugins.

The key tables of docs/configuration.md are drawn from the same tables (docs/generate.py).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import attrs

from corefit.pipeline.meanings import meanings
from corefit.pipeline.pipeline import CHOICES, Pipeline
from corefit.pipeline.reader import TABLE, Reader, fields_of_other_tables, has_any_length
from corefit.plugins.host import Host
from corefit.plugins.kinds import BY_PROTOCOL, Kind
from corefit.types import ModelPath, Reward, Url, Weighted, key_of
from corefit.types.objective import Sum
from corefit.types.values import Normalization

DIALECT = "https://json-schema.org/draft/2020-12/schema"
PLAIN: Mapping[Any, Mapping[str, str]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    Path: {"type": "string", "format": "path"},
    ModelPath: {"type": "string", "format": "path-or-address"},
    Url: {"type": "string", "format": "path-or-address"},
}
"""Types of plain values. The two formats are corefit's own: editors ignore formats that they do not know."""
Schema = dict[str, Any]


def schema(host: Host) -> Schema:
    """The JSON Schema of a whole pipeline file, by which editors complete keys and underline mistakes."""
    writer = Writer(host)
    whole = writer.table(Pipeline)
    for field in fields_of_other_tables(Pipeline):
        for table in whole["properties"][field.metadata[TABLE]]["anyOf"]:
            table["properties"][field.name] = writer.key(field, meanings(Pipeline))
    return {"$schema": DIALECT, **whole, "title": "corefit pipeline"}


@attrs.define(eq=False)
class Writer:
    """Writes the JSON Schema of classes and of their keys."""

    host: Host
    _reader: Reader = attrs.field(init=False)
    """Turns the value that a key has by default into what a file would say."""

    def __attrs_post_init__(self) -> None:
        self._reader = Reader(self.host, Path(), CHOICES)

    def table(self, cls: type[Any], use: str | None = None, default: str = "") -> Schema:
        """The schema of a table that is read as the attrs class `cls`; `use` is the name that picks it.

        A table without `use` has the one that is the `default`.
        Keys that the file has in another table are left out. The title is the name of the class.
        """
        attrs.resolve_types(cls, include_extras=True)
        fields = [f for f in attrs.fields(cls) if f.init and TABLE not in f.metadata]
        texts = meanings(cls)
        properties = {key_of(f.name): self.key(f, texts) for f in fields}
        required = [key_of(f.name) for f in fields if f.default is attrs.NOTHING]
        if use is not None:
            properties = {"use": {"const": use}, **properties}
            required = required if use == default else ["use", *required]
        summary = (inspect.getdoc(cls) or "").partition("\n\n")[0]
        return {
            "type": "object",
            "title": cls.__name__,
            **({"description": " ".join(summary.split())} if summary else {}),
            "properties": properties,
            "additionalProperties": False,
            **({"required": required} if required else {}),
        }

    def key(self, field: attrs.Attribute[Any], texts: Mapping[str, str]) -> Schema:
        """The schema of one key: its type, its meaning, and the value that it has where it is left out."""
        described = {"description": texts[field.name]} if field.name in texts else {}
        return self.of(field.type) | described | self._default(field.default)

    def of(self, kind: Any) -> Schema:
        """The schema of a field's type. That of a plugin has the name of its kind as title."""
        if kind in CHOICES:
            return {"anyOf": [self.table(cls, use) for use, cls in CHOICES[kind].items()]}
        origin, args = get_origin(kind) or kind, get_args(kind)
        if origin in (Union, UnionType):
            # a path or an address is one text
            inner = [arg for arg in args if arg is not NoneType and not (arg is Path and Url in args)]
            return self.of(inner[0]) if len(inner) == 1 else {"anyOf": [self.of(arg) for arg in inner]}
        if origin is Literal:
            return {"enum": list(args)}
        if origin in (tuple, list, Sequence):
            return _list(kind, self.of)
        if origin is Mapping:
            return {"type": "object", "additionalProperties": self.of(args[1])}
        if origin is Weighted:
            return self._weighted(BY_PROTOCOL[get_origin(args[0]) or args[0]])
        if origin in BY_PROTOCOL:
            plugin = BY_PROTOCOL[origin]
            offers = sorted(self.host.offers[plugin.key].items())
            tables = [self.table(offer.cls, name, plugin.default) for name, offer in offers]
            return {"title": plugin.name, "anyOf": tables or [{}]}
        return self.table(kind) if attrs.has(kind) else dict(PLAIN.get(kind, {}))

    def _weighted(self, plugin: Kind) -> Schema:
        """The schema of any plugin of a kind with what `Weighted` has beside its keys; sums hold no sums."""
        offers = {name: offer.cls for name, offer in sorted(self.host.offers[plugin.key].items())}
        tables = [self.table(cls, name) for name, cls in offers.items() if cls is not Sum]
        for table in tables:
            table["properties"]["weight"] = {
                "type": "number",
                "description": f"Factor of this {plugin.name} in the sum.",
                "default": 1.0,
            }
            if plugin is BY_PROTOCOL[Reward]:
                table["properties"]["name"] = {
                    "type": "string",
                    "description": "Name under which it is logged and reported, by default that of `use`; it tells "
                    "several entries of one reward apart.",
                }
                table["properties"]["normalize"] = {
                    "enum": list(get_args(Normalization)),
                    "description": '"batch" subtracts the mean of the batch from the scores and divides by their '
                    "standard deviation, before they are weighted. For stages only.",
                    "default": "none",
                }
        return {"title": plugin.name, "anyOf": tables or [{}]}

    def _default(self, default: Any) -> Schema:
        """The value of a key that is left out, where JSON can say it; none for one that is then not set."""
        if isinstance(default, attrs.Factory):  # pyright: ignore[reportArgumentType]
            if default.takes_self:
                return {}
            default = default.factory()
        try:
            value = json.loads(json.dumps(self._reader.tables(default), allow_nan=False))
        except (TypeError, ValueError):
            return {}
        return {} if value is None else {"default": value}


def _list(kind: Any, of: Callable[[Any], Schema]) -> Schema:
    kinds = get_args(kind)
    if has_any_length(kind):
        return {"type": "array", "items": of(kinds[0])}
    return {
        "type": "array",
        "prefixItems": [of(each) for each in kinds],
        "minItems": len(kinds),
        "maxItems": len(kinds),
    }
