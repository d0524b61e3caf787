"""Turns TOML tables into attrs classes (with cattrs), and its errors into messages about the file.

The fields of a class are the keys of its table (`key_of`). `use = "name"` chooses a plugin's class. A message has the
TOML path, a near miss and the known keys; all problems of a file are reported at once.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, reduce
from itertools import pairwise, repeat
from operator import or_
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import attrs
import cattrs
from attrs import define, field
from cattrs.errors import (
    ClassValidationError,
    ForbiddenExtraKeysError,
    IterableValidationError,
    IterableValidationNote,
)
from cattrs.gen import make_dict_structure_fn
from cattrs.gen import override as overridden

from corefit.errors import ConfigError, is_unicode, near, short_repr
from corefit.plugins import contract
from corefit.plugins.host import Host
from corefit.plugins.kinds import BY_PROTOCOL, KINDS
from corefit.types import ModelPath, Reward, Url, Weighted, blame, key_of

T = TypeVar("T")
Table = dict[str, Any]
LARGEST = 16 << 20
"""Largest size of a pipeline file in bytes: parsing a larger file, which is something else, would take minutes."""
LONGEST_NAME, LONGEST_PATH = 255, 4000
"""Limits that file systems set, in bytes: of one name, and of a whole path."""
WHOLE = 1 << 63
"""Whole numbers must be smaller than this, as in TOML and in arrays (int64)."""
TABLE = "table"
"""Metadata key of a field that the file has in another table; its value is the field that is read from that table."""
ENTRY_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}")
"""What a reward's entry may be called."""
VALIDATOR_MESSAGE = re.compile(r"'(?P<key>\w+)' (?P<rule>must .+)", re.DOTALL)
"""The message of a validator (attrs' own, or a plugin's), which names the key first."""


def load(path: Path) -> Table:
    """Read a TOML file; a file that is not TOML raises ConfigError with the line."""
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
    except ValueError as error:  # bad TOML, bad UTF-8, and numbers with thousands of digits
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
            parsed = tomllib.loads(f"value = {text}")
        except (ValueError, RecursionError):
            parsed = {"value": text.strip()}
        if parsed.keys() != {"value"}:
            raise ConfigError(f"--set {setting!r}: it has several lines; give each key a --set of its own")
        value = parsed["value"]
        *parents, last = key.strip().split(".")
        _table(tables, parents, setting)[last] = value


def _table(tables: Table, keys: Sequence[str], setting: str) -> Table:
    """Return the table at the path `keys`. Missing tables are made; entries of lists (stages, rewards) must exist."""
    found: Any = tables
    for before, key in pairwise(["", *keys]):
        if isinstance(found, list):
            named = _by_name(found)
            if key not in named:
                known = f"there are: {', '.join(named) or 'none'}"
                raise ConfigError(f"--set {setting}: there is no {before} {key!r}{near(key, named)}; {known}")
            found = named[key]
        else:
            found = found.setdefault(key, {})
        if not isinstance(found, (dict, list)):
            raise ConfigError(f"--set {setting}: {key!r} is {short_repr(found)}, not a table; set the whole of it")
    if isinstance(found, list):
        known = ", ".join(_by_name(found))
        raise ConfigError(f"--set {setting}: say which {keys[-1]} ({known}), as in {'.'.join(keys)}.NAME.KEY=VALUE")
    return found


def _by_name(entries: Sequence[Any]) -> Table:
    """Return the tables of a list by their `name`, or by their `use`."""
    return {str(entry.get("name", entry.get("use"))): entry for entry in entries if isinstance(entry, dict)}


@define(eq=False)
class Reader:
    """Turns tables into objects for one pipeline, with its plugins, and its folder, which paths are relative to."""

    host: Host
    folder: Path
    choices: Mapping[Any, Mapping[str, type]] = field(factory=dict[Any, "Mapping[str, type]"])
    """Types whose table chooses one of corefit's own classes with `use`, such as full or lora training."""
    _whole: type = field(init=False, default=object)
    """The class of the whole file, whose fields may have keys in each other's tables."""

    @cached_property
    def _converter(self) -> cattrs.Converter:
        """What `read` needs, and `tables`, which is called for every comparison of stages, does not."""
        c = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
        for kind in (bool, int, float, str):
            c.register_structure_hook(kind, _strict)
        c.register_structure_hook(Path, lambda value, _: self.folder / checked_path(value))
        c.register_structure_hook_func(_is_place, lambda value, _: self._place(value))
        c.register_structure_hook_func(lambda t: t is ModelPath, lambda value, _: self._model(value))
        c.register_structure_hook_func(lambda t: get_origin(t) is Literal, _literal)
        c.register_structure_hook_func(lambda t: _base(t) in BY_PROTOCOL, self._plugin)
        c.register_structure_hook_func(lambda t: t in self.choices, self._choice)
        c.register_structure_hook_func(_is_list, self._list)
        c.register_structure_hook_func(lambda t: _base(t) is Weighted, self._weighted)
        c.register_structure_hook_func(_is_one_or_list, self._one_or_list)
        c.register_structure_hook_factory(_has_renamed_keys, self._with_renamed_keys)
        return c

    def read(self, table: Table, cls: type[T]) -> T:
        """Make a `cls` of `table`; ConfigError lists every problem found."""
        self._whole, table = cls, _with_keys_moved(table, cls)
        try:
            with blame.no_exit():
                return self._converter.structure(table, cls)
        except cattrs.BaseValidationError as error:
            problems = list(dict.fromkeys(self._problems(error, "", table)))
            raise ConfigError("\n".join(problems)) from error

    def tables(self, value: Any, name_path: Callable[[str], str] = str) -> Any:
        """Return `value` as plain tables with every default written out, the inverse of `read`.

        name_path  returns how the tables name a path, which is absolute
        """
        if isinstance(value, Weighted):
            normalize = {} if value.normalize == "none" else {"normalize": value.normalize}
            tables = self.tables(value.value, name_path)
            name = {} if tables.get("use", value.name) == value.name else {"name": value.name}
            return {**tables, **name, "weight": value.weight, **normalize}
        if attrs.has(type(value)):
            fields = [f for f in attrs.fields(type(value)) if f.init]
            known = [f for f in fields if getattr(value, f.name) is not None]
            rest = {key_of(f.name): self.tables(getattr(value, f.name), name_path) for f in known}
            rest |= {key: name_path(rest[key]) for key in map(key_of, _model_paths(type(value))) if key in rest}
            for f in fields_of_other_tables(type(value)):
                rest[f.metadata[TABLE]][f.name] = rest.pop(f.name)
            return {**self._use_of(value), **rest}
        if isinstance(value, (list, tuple)):
            return [self.tables(v, name_path) for v in value]
        return name_path(str(value)) if isinstance(value, Path) else value

    def _use_of(self, value: Any) -> Table:
        for kind, offers in self.host.offers.items():
            if any(offer.cls is type(value) for offer in offers.values()):
                name = self.host.name_of(kind, value)
                return {} if name == KINDS[kind].default else {"use": name}
        for classes in self.choices.values():
            for name, cls in classes.items():
                if cls is type(value):
                    return {"use": name}
        return {}

    def _plugin(self, value: Any, target: Any) -> Any:
        kind = BY_PROTOCOL[_base(target)]
        name, rest = _split_use(value, kind.name, self.host.offers[kind.key], kind.default)
        plugin = self._converter.structure(rest, self.host.get(kind.key, name))
        contract.declared(plugin, kind.key)
        return plugin

    def _choice(self, value: Any, target: Any) -> Any:
        classes = self.choices[target]
        name, rest = _split_use(value, "choice", classes)
        if name not in classes:
            raise ConfigError(f"use: {name!r} is not one of {', '.join(classes)}{near(name, classes)}")
        return self._converter.structure(rest, classes[name])

    def _weighted(self, value: Any, target: Any) -> Weighted[Any]:
        """Read a plugin's table that has a `weight`, and for a reward more (`OF_ENTRIES`), beside the plugin's keys."""
        plugin = _weighted_kind(target)
        kind = BY_PROTOCOL[_base(plugin)]
        use, rest = _split_use(value, kind.name, self.host.offers[kind.key])
        weight = _strict(rest.pop("weight", 1.0), float, "'weight' ")
        normalize, name = "none", use
        if plugin is Reward:
            normalize, name = rest.pop("normalize", "none"), _entry_name(rest.pop("name", use), use)
        return Weighted(name, self._plugin({"use": use, **rest}, plugin), weight, normalize)

    def _list(self, value: Any, target: Any) -> Any:
        """Read a list of as many items as the type says. Text and tables, also iterable, are refused."""
        kinds = get_args(target)
        many = has_any_length(target)
        if not isinstance(value, (list, tuple)):
            found = (
                "a table: write [[...]] or [{ ... }]"
                if isinstance(value, Mapping)
                else f"{short_repr(value)}: write [...]"
            )
            raise ConfigError(f"must be a list, not {found}")
        if not many and len(value) != len(kinds):
            raise ConfigError(f"must be a list of {len(kinds)}, not {short_repr(value)}")
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

    def _one_or_list(self, value: Any, target: Any) -> Any:
        """Read a key that takes one value or a list, such as `Path | tuple[str, ...]`."""
        listed = isinstance(value, (list, tuple))
        kinds = (kind for kind in get_args(target) if _is_list(kind) == listed)
        kind: Any = reduce(or_, kinds)  # of the types of one value there may be several
        return self._converter.structure(value, kind)

    def _with_renamed_keys(self, cls: type) -> Any:
        """Return the hook for a class with fields such as `from_`, whose keys are Python's reserved words."""
        renamed: Any = {f.name: overridden(rename=key_of(f.name)) for f in attrs.fields(cls)}
        return make_dict_structure_fn(cls, self._converter, **renamed)

    def _model(self, value: Any) -> ModelPath:
        if value == "":
            raise ConfigError("must name a folder, or a model on the hub, not ''")
        local = self.folder / checked_path(value)
        return ModelPath(str(local) if local.exists() or value.startswith((".", "/")) else value)

    def _place(self, value: Any) -> Path | Url:
        """Read an address, or a path, which is relative to the pipeline."""
        text = checked_path(value)
        return Url(text) if "://" in text else self.folder / text

    def _problems(self, error: BaseException, path: str, table: Any, kind: Any = None) -> Iterator[str]:
        """Yield one line for each problem in cattrs' tree of errors; `kind` is the type that the table is read as."""
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
        name = key_of(note.name)
        if isinstance(error, KeyError):
            yield f"{_dotted(path, name)} is missing; {_dotted(path, '') or 'the file'} needs it"
        else:
            yield from self._problems(error, _dotted(path, name), _entry(table, name), note.type)

    def _unplaced(self, error: BaseException, path: str, table: Any, kind: Any) -> Iterator[str]:
        """Yield the lines of an error that has no note of its place."""
        if isinstance(error, cattrs.BaseValidationError):
            yield from self._problems(error, path, table, kind)
        elif isinstance(error, ForbiddenExtraKeysError):
            own = (_dotted(f.metadata.get(TABLE, ""), key_of(f.name)) for f in attrs.fields(error.cl) if f.init)
            known = [*own, *self._extra_keys(kind)]
            for extra in sorted(error.extra_fields):
                listing = ", ".join(known) or "none"
                yield f"{_dotted(path, extra)} is not a key{near(extra, known)}; known here: {listing}"
        elif isinstance(error, (TypeError, AttributeError)) and not isinstance(table, Mapping):
            yield f"{_dotted(path, '')}: must be a table, not {short_repr(table)}"
        else:
            text = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
            if about_key := VALIDATOR_MESSAGE.fullmatch(text):
                path, text = _dotted(path, key_of(about_key["key"])), about_key["rule"]
            yield f"{_dotted(path, '') or 'the pipeline'}: {text}"

    def _extra_keys(self, kind: Any) -> list[str]:
        """Return the keys that a table of the type `kind` may have beside those of the plugin's class."""
        if _base(kind) is Weighted:
            return ["name", "weight", "normalize"] if _weighted_kind(kind) is Reward else ["weight"]
        tables = {f.name: f.type for f in attrs.fields(self._whole)}
        return [f.name for f in fields_of_other_tables(self._whole) if tables[f.metadata[TABLE]] is kind]


def fields_of_other_tables(cls: type) -> list[attrs.Attribute[Any]]:
    """Return the fields whose keys the file has in another field's table."""
    return [f for f in attrs.fields(cls) if TABLE in f.metadata]


def _model_paths(cls: type) -> list[str]:
    """Return the names of the fields that hold a path or the address of a model."""
    attrs.resolve_types(cls)
    return [f.name for f in attrs.fields(cls) if ModelPath in (f.type, *get_args(f.type))]


def _with_keys_moved(table: Table, cls: type) -> Table:
    """Return the tables with every such key moved to its own field; ConfigError if the file has the key there."""
    rest = dict(table)
    for f in fields_of_other_tables(cls):
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


def _is_list(kind: Any) -> bool:
    return get_origin(kind) in (tuple, list, Sequence)


def _is_one_or_list(target: Any) -> bool:
    kinds = get_args(target) if get_origin(target) in (Union, UnionType) else ()
    return len(kinds) > 1 and NoneType not in kinds and sum(map(_is_list, kinds)) == 1


def _is_place(target: Any) -> bool:
    """Return whether a type is `Path | Url`; it may be None too, where the file leaves it out."""
    return {*get_args(target)} - {NoneType} == {Path, Url}


def _has_renamed_keys(cls: Any) -> bool:
    return attrs.has(cls) and any(key_of(f.name) != f.name for f in attrs.fields(cls))


def _weighted_kind(target: Any) -> Any:
    """Return the protocol of what is weighted: a reward where the type does not say."""
    return next(iter(get_args(target)), Reward)


def _entry_name(value: Any, use: str) -> str:
    """Return the `name` of a reward's entry, by default its `use`; it names metrics and what `[data] keep` reads."""
    if value == use or (isinstance(value, str) and ENTRY_NAME.fullmatch(value)):
        return str(value)
    raise ConfigError(
        f"'name' must be at most 100 letters, digits and _, and begin with a letter, not {short_repr(value)}"
    )


def _base(target: Any) -> Any:
    return get_origin(target) or target


def _split_use(value: Any, what: str, known: Mapping[str, Any], default: str = "") -> tuple[str, Table]:
    """Return the `use` of a table, or else the default, and its other keys."""
    if not isinstance(value, Mapping):
        raise ConfigError(f'must be a table such as {{ use = "{next(iter(known), "name")}" }}, not {short_repr(value)}')
    rest = dict(value)
    name = rest.pop("use", default or None)
    if not isinstance(name, str):
        raise ConfigError(f"needs `use`, the name of one {what}: {', '.join(sorted(known)) or 'none is installed'}")
    return name, rest


def _strict(value: Any, target: type[T], key: str = "") -> T:
    """Return a value of exactly the type `target`. Integers also pass as floats; nan and inf are refused."""
    if target is float and isinstance(value, int) and not isinstance(value, bool) and _is_valid(value):
        return float(value)  # pyright: ignore[reportReturnType]
    if type(value) is not target or not _is_valid(value):
        wanted = "text without NUL and lone surrogates" if type(value) is str is target else _TYPE_WORDS[target]
        raise ConfigError(f"{key}must be {wanted}, not {short_repr(value)}")
    return value


def checked_path(value: Any) -> str:
    """Return a path, unless it is longer than file systems allow."""
    text = _strict(value, str)
    if len(os.fsencode(text)) > LONGEST_PATH or any(len(os.fsencode(part)) > LONGEST_NAME for part in Path(text).parts):
        raise ConfigError(f"must be a path of at most {LONGEST_NAME} bytes a name, not {short_repr(text)}")
    return text


def _is_valid(value: Any) -> bool:
    """Return whether a number is finite and fits into 64 bits, or a text can be written to a file."""
    if isinstance(value, str):
        return "\0" not in value and is_unicode(value)
    return math.isfinite(value) if isinstance(value, float) else abs(value) < WHOLE


_TYPE_WORDS: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text in quotes",
}


def _literal(value: Any, target: Any) -> Any:
    choices = get_args(target)
    if value not in choices or isinstance(value, bool):
        hint = near(value, choices) if isinstance(value, str) else ""
        raise ConfigError(f"must be one of {', '.join(map(repr, choices))}, not {short_repr(value)}{hint}")
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
    """Return the name of an entry of a list if it has one, otherwise its index."""
    if isinstance(entry, Mapping) and isinstance(entry.get("name"), str):
        return str(entry["name"])
    return str(index)
