"""TOML table -> attrs class (cattrs). Every config error message is here.

A class's fields are its keys. `use = "name"` picks a plugin's class. Errors carry the TOML path, the near miss
and the known keys; all problems of a file are told at once.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import attrs
import cattrs
from attrs import define, field
from cattrs.errors import (
    ClassValidationError,
    ForbiddenExtraKeysError,
    IterableValidationError,
    IterableValidationNote,
)

from corefit.errors import ConfigError, is_unicode, near, shown
from corefit.plugins import contract
from corefit.plugins.host import Host
from corefit.plugins.kinds import BY_PROTOCOL
from corefit.types import ModelPath, Reward, Weighted, blame

T = TypeVar("T")
Table = dict[str, Any]
LARGEST = 16 << 20
"""Bytes of a pipeline file; more is read for minutes before it is found to be something else."""
LONGEST_NAME, LONGEST_PATH = 255, 4000
"""Bytes of a file's name and of a path, as file systems have them."""
WHOLE = 1 << 63
"""TOML's whole numbers are smaller, and those of arrays."""
TABLE = "table"
"""Metadata of a field whose key the file has in another table: the field that is read from that table."""
COMPARED = re.compile(r"'(?P<key>\w+)' (?P<rule>must .+)", re.DOTALL)
"""How validators begin: attrs' own, and those of plugins."""


def load(path: Path) -> Table:
    """The tables of a TOML file; ConfigError with the line where it is none."""
    try:
        if path.stat().st_size > LARGEST:
            raise ConfigError(f"{path} has more than {LARGEST >> 20} MiB and is no pipeline file; name another")
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"there is no pipeline file {path}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; name the pipeline file in it") from None
    except RecursionError:
        raise ConfigError(f"{path} is not valid TOML: lists or tables are inside each other too deeply") from None
    except ValueError as error:  # of the grammar, of UTF-8, and of numbers with thousands of digits
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def override(tables: Table, settings: Sequence[str]) -> None:
    """Apply `--set stage.soar.steps=100`: dotted keys, stages by name, values in TOML (bare words are text)."""
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not all(key.strip().split(".")):
            raise ConfigError(f"--set {setting}: write KEY=VALUE, such as stage.soar.steps=100")
        try:
            said = tomllib.loads(f"value = {text}")
        except (ValueError, RecursionError):
            said = {"value": text.strip()}
        if said.keys() != {"value"}:
            raise ConfigError(f"--set {setting!r}: it has several lines; give each key a --set of its own")
        value = said["value"]
        *parents, last = key.strip().split(".")
        _table(tables, parents, setting)[last] = value


def _table(tables: Table, keys: Sequence[str], setting: str) -> Table:
    """The table that `keys` lead to; made where absent, but entries of lists (stages, rewards) must exist."""
    here: Any = tables
    for before, key in pairwise(["", *keys]):
        if isinstance(here, list):
            named = _named(here)
            if key not in named:
                known = f"there are: {', '.join(named) or 'none'}"
                raise ConfigError(f"--set {setting}: there is no {before} {key!r}{near(key, named)}; {known}")
            here = named[key]
        else:
            here = here.setdefault(key, {})
        if not isinstance(here, (dict, list)):
            raise ConfigError(f"--set {setting}: {key!r} is {shown(here)}, not a table; set the whole of it")
    if isinstance(here, list):
        known = ", ".join(_named(here))
        raise ConfigError(f"--set {setting}: say which {keys[-1]} ({known}), as in {'.'.join(keys)}.NAME.KEY=VALUE")
    return here


def _named(entries: Sequence[Any]) -> Table:
    """Tables of a list by the name they have, or by what they use."""
    return {str(entry.get("name", entry.get("use"))): entry for entry in entries if isinstance(entry, dict)}


@define(eq=False)
class Reader:
    """Structures tables for one pipeline: knows its plugins, and the folder its paths are relative to."""

    host: Host
    folder: Path
    choices: Mapping[Any, Mapping[str, type]] = field(factory=dict[Any, "Mapping[str, type]"])
    """Types whose table picks a class of corefit's own with `use`, such as full or lora training."""
    _whole: type = field(init=False, default=object)
    """The class that is read: its fields may have keys in each other's tables."""
    _converter: cattrs.Converter = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._converter = c = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
        for kind in (bool, int, float, str):
            c.register_structure_hook(kind, _strict)
        c.register_structure_hook(Path, lambda value, _: self.folder / checked_path(value))
        c.register_structure_hook_func(lambda t: t is ModelPath, lambda value, _: self._model(value))
        c.register_structure_hook_func(lambda t: get_origin(t) is Literal, _one_of)
        c.register_structure_hook_func(lambda t: _plain(t) in BY_PROTOCOL, self._plugin)
        c.register_structure_hook_func(lambda t: t in self.choices, self._choice)
        c.register_structure_hook_func(lambda t: get_origin(t) in (tuple, list, Sequence), self._list)
        c.register_structure_hook_func(lambda t: _plain(t) is Weighted, self._weighted)

    def read(self, table: Table, cls: type[T]) -> T:
        """`table` as a `cls`; ConfigError with every problem found."""
        self._whole, table = cls, _gathered(table, cls)
        try:
            with blame.no_exit():
                return self._converter.structure(table, cls)
        except cattrs.BaseValidationError as error:
            problems = list(dict.fromkeys(self._problems(error, "", table)))
            raise ConfigError("\n".join(problems)) from error

    def tables(self, value: Any) -> Any:
        """The inverse: plain tables with every default written out."""
        if isinstance(value, Weighted):
            return {**self.tables(value.value), "weight": value.weight}
        if attrs.has(type(value)):
            fields = [f for f in attrs.fields(type(value)) if f.init]
            rest = {f.name: self.tables(getattr(value, f.name)) for f in fields if getattr(value, f.name) is not None}
            for f in elsewhere(type(value)):
                rest[f.metadata[TABLE]][f.name] = rest.pop(f.name)
            return {**self._use(value), **rest}
        if isinstance(value, (list, tuple)):
            return [self.tables(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    def _use(self, value: Any) -> Table:
        for kind, offers in self.host.offers.items():
            if any(offer.cls is type(value) for offer in offers.values()):
                return {"use": self.host.name_of(kind, value)}
        for classes in self.choices.values():
            for name, cls in classes.items():
                if cls is type(value):
                    return {"use": name}
        return {}

    def _plugin(self, value: Any, target: Any) -> Any:
        kind = BY_PROTOCOL[_plain(target)]
        name, rest = _used(value, kind.name, self.host.offers[kind.key])
        made = self._converter.structure(rest, self.host.get(kind.key, name))
        contract.declared(made, kind.key)
        return made

    def _choice(self, value: Any, target: Any) -> Any:
        classes = self.choices[target]
        name, rest = _used(value, "choice", classes)
        if name not in classes:
            raise ConfigError(f"use: {name!r} is not one of {', '.join(classes)}{near(name, classes)}")
        return self._converter.structure(rest, classes[name])

    def _weighted(self, value: Any, target: Any) -> Weighted[Any]:
        """A plugin's table with a `weight` beside its own keys."""
        plugin = next(iter(get_args(target)), Reward)
        kind = BY_PROTOCOL[_plain(plugin)]
        name, rest = _used(value, kind.name, self.host.offers[kind.key])
        weight = _strict(rest.pop("weight", 1.0), float, "'weight' ")
        return Weighted(name, self._plugin({"use": name, **rest}, plugin), weight)

    def _list(self, value: Any, target: Any) -> Any:
        """A list of as many items as the type says; text and tables are none, though Python could walk them."""
        kinds = get_args(target)
        many = has_any_length(target)
        if not isinstance(value, (list, tuple)):
            found = (
                "a table: write [[...]] or [{ ... }]" if isinstance(value, Mapping) else f"{shown(value)}: write [...]"
            )
            raise ConfigError(f"must be a list, not {found}")
        if not many and len(value) != len(kinds):
            raise ConfigError(f"must be a list of {len(kinds)}, not {shown(value)}")
        items = self._items(value, repeat(kinds[0]) if many else kinds, target)
        return items if get_origin(target) is list else tuple(items)

    def _items(self, values: Sequence[Any], kinds: Iterable[Any], target: Any) -> list[Any]:
        items: list[Any] = []
        errors: list[Exception] = []
        for number, (value, kind) in enumerate(zip(values, kinds, strict=False)):
            try:
                items.append(self._converter.structure(value, kind))
            except Exception as error:
                error.add_note(IterableValidationNote("", number, kind))
                errors.append(error)
        if errors:
            raise IterableValidationError("items", errors, target)  # pyright: ignore[reportCallIssue]
        return items

    def _model(self, value: Any) -> ModelPath:
        if value == "":
            raise ConfigError("must name a folder, or a model on the hub, not ''")
        local = self.folder / checked_path(value)
        return ModelPath(str(local) if local.exists() or value.startswith((".", "/")) else value)

    def _problems(self, error: BaseException, path: str, table: Any, kind: Any = None) -> Iterator[str]:
        """One line for each problem in cattrs' tree of errors; `kind` is the type that the table is read as."""
        if isinstance(error, IterableValidationError):
            noted, rest = error.group_exceptions()
            for inner, note in noted:
                entry = _entry(table, note.index)
                yield from self._problems(inner, f"{path}.{_label(entry, note.index)}", entry, note.type)
        elif isinstance(error, ClassValidationError):
            noted, rest = error.group_exceptions()
            for inner, note in noted:
                place = attrs.fields_dict(error.cl)[note.name].metadata.get(TABLE, "")
                yield from self._field_problems(inner, _dotted(path, place), note, table)
        else:
            noted, rest = [], [error]
        for inner in rest:
            yield from self._unplaced(inner, path, table, kind)

    def _field_problems(self, error: BaseException, path: str, note: Any, table: Any) -> Iterator[str]:
        name: str = note.name
        if isinstance(error, KeyError):
            yield f"{_dotted(path, name)} is missing; {_dotted(path, '') or 'the file'} needs it"
        else:
            yield from self._problems(error, _dotted(path, name), _entry(table, name), note.type)

    def _unplaced(self, error: BaseException, path: str, table: Any, kind: Any) -> Iterator[str]:
        if isinstance(error, cattrs.BaseValidationError):
            yield from self._problems(error, path, table, kind)
        elif isinstance(error, ForbiddenExtraKeysError):
            own = (_dotted(f.metadata.get(TABLE, ""), f.name) for f in attrs.fields(error.cl) if f.init)
            known = [*own, *self._beside(kind)]
            for extra in sorted(error.extra_fields):
                listing = ", ".join(known) or "none"
                yield f"{_dotted(path, extra)} is not a key{near(extra, known)}; known here: {listing}"
        elif isinstance(error, (TypeError, AttributeError)) and not isinstance(table, Mapping):
            yield f"{_dotted(path, '')}: must be a table, not {shown(table)}"
        else:
            text = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
            if of_key := COMPARED.fullmatch(text):
                path, text = _dotted(path, of_key["key"]), of_key["rule"]
            yield f"{_dotted(path, '') or 'the pipeline'}: {text}"

    def _beside(self, kind: Any) -> list[str]:
        """Keys that a table read as `kind` has beside those of the plugin's class."""
        if _plain(kind) is Weighted:
            return ["weight"]
        tables = {f.name: f.type for f in attrs.fields(self._whole)}
        return [f.name for f in elsewhere(self._whole) if tables[f.metadata[TABLE]] is kind]


def elsewhere(cls: type) -> list[attrs.Attribute[Any]]:
    """The fields whose keys the file has in another field's table."""
    return [f for f in attrs.fields(cls) if TABLE in f.metadata]


def _gathered(table: Table, cls: type) -> Table:
    """The tables with every key where its class has it. ConfigError for one that the file has there itself."""
    rest = dict(table)
    for f in elsewhere(cls):
        place = f.metadata[TABLE]
        if f.name in rest:
            raise ConfigError(f"{f.name}: is a key of [{place}]; move it there")
        if isinstance(inner := rest.get(place), Mapping) and f.name in inner:
            rest[place] = {key: value for key, value in inner.items() if key != f.name}
            rest[f.name] = inner[f.name]
    return rest


def has_any_length(target: Any) -> bool:
    """Whether a type of lists leaves their length open, as `list[int]` and `tuple[int, ...]` do."""
    return get_origin(target) is not tuple or get_args(target)[-1:] == (...,)


def _plain(target: Any) -> Any:
    return get_origin(target) or target


def _used(value: Any, what: str, known: Mapping[str, Any]) -> tuple[str, Table]:
    """The `use` of a table and its other keys."""
    if not isinstance(value, Mapping):
        raise ConfigError(f'must be a table such as {{ use = "{next(iter(known), "name")}" }}, not {shown(value)}')
    rest = dict(value)
    name = rest.pop("use", None)
    if not isinstance(name, str):
        raise ConfigError(f"needs `use`, the name of one {what}: {', '.join(sorted(known)) or 'none is installed'}")
    return name, rest


def _strict(value: Any, target: type[T], key: str = "") -> T:
    """A value of exactly the type that is asked for; integers also pass as floats, nan and inf as nothing."""
    if target is float and isinstance(value, int) and not isinstance(value, bool) and _sound(value):
        return float(value)  # pyright: ignore[reportReturnType]
    if type(value) is not target or not _sound(value):
        wanted = "text without NUL and lone surrogates" if type(value) is str is target else _TYPE_WORDS[target]
        raise ConfigError(f"{key}must be {wanted}, not {shown(value)}")
    return value


def checked_path(value: Any) -> str:
    """A path that a file system can be asked for."""
    text = _strict(value, str)
    if len(os.fsencode(text)) > LONGEST_PATH or any(len(os.fsencode(part)) > LONGEST_NAME for part in Path(text).parts):
        raise ConfigError(f"must be a path of at most {LONGEST_NAME} bytes a name, not {shown(text)}")
    return text


def _sound(value: Any) -> bool:
    """Whether a number is finite and not beyond all others, and a text can be written to a file."""
    if isinstance(value, str):
        return "\0" not in value and is_unicode(value)
    return math.isfinite(value) if isinstance(value, float) else abs(value) < WHOLE


_TYPE_WORDS: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text in quotes",
}


def _one_of(value: Any, target: Any) -> Any:
    choices = get_args(target)
    if value not in choices or isinstance(value, bool):
        hint = near(value, choices) if isinstance(value, str) else ""
        raise ConfigError(f"must be one of {', '.join(map(repr, choices))}, not {shown(value)}{hint}")
    return value


def _dotted(path: str, name: str) -> str:
    return f"{path}.{name}".strip(".")


def _entry(table: Any, key: Any) -> Any:
    if isinstance(table, Mapping):
        return table.get(key)
    if isinstance(table, Sequence) and isinstance(key, int) and key < len(table):
        return table[key]
    return None


def _label(entry: Any, index: Any) -> str:
    """A stage's name where it has one, its number in the list otherwise."""
    if isinstance(entry, Mapping) and isinstance(entry.get("name"), str):
        return str(entry["name"])
    return str(index)
