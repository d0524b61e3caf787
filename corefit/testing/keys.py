"""Finds keys that nothing reads: a user would set them and see them logged, and they would have no effect."""

from __future__ import annotations

import ast
import builtins
import inspect
import sys
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import attrs

from corefit.testing.checks import expect

WHOLE = {"asdict", "astuple", "vars"}
"""Functions that read all fields of an object."""
HARMLESS = {"attr", "attrs"}
"""Packages whose functions, other than those in WHOLE, read no field that the call does not name."""


def check_keys(cls: type[Any], protocol: type[Any]) -> None:
    """Raise AssertionError unless each key of the attrs class `cls` is read somewhere in its code, or by corefit.

    The source is searched, not run, so a key counts as read even if it matters only for some value of another key. A
    key is read by `self.key` in the class or in one that it derives from. If the class passes itself to other code of
    its package, `anything.key` there counts as well. Names that `protocol` has are read by corefit. Nothing is checked
    for a class without source, or one that passes itself to another package.
    """
    if not attrs.has(cls):
        return
    keys = {field.name for field in attrs.fields(cls) if field.init} - set(dir(protocol)) - _annotated(protocol)
    for each in cls.__mro__:
        if each.__module__ not in {"builtins", "abc", "typing"}:
            keys -= _read(each, keys)
    names = ", ".join(repr(key) for key in sorted(keys))
    expect(
        not keys,
        f"nothing reads {names}: a pipeline that sets {'it' if len(keys) == 1 else 'them'} would train as if it had "
        f"not. Use self.{min(keys, default='')}, or take the field out of the class",
    )


def _annotated(protocol: type[Any]) -> set[str]:
    return {name for each in protocol.__mro__ for name in getattr(each, "__annotations__", {})}


def _read(cls: type[Any], keys: set[str]) -> set[str]:
    """Return those of `keys` that the code of one class reads or lets others read; all of them if it cannot be seen."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return keys
    names = _owners(tree)
    found = {name for owner, name, _ in _attributes(tree) if owner in names}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    if "__dict__" in found or any(_reads_all(call, names, cls) for call in calls):
        return keys
    found |= {text for call in calls for text in _constants(call)}
    if _handed_on(tree, names):
        for module in _package(cls):
            found |= _mentioned(module)
    return keys & found


def _owners(tree: ast.AST) -> set[str]:
    """Return the names of `self` in a class: the leading argument of its methods, and of lambdas in its body."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    functions: list[ast.FunctionDef | ast.Lambda] = []
    for node in (statement for each in classes for statement in each.body):
        found = [node] if isinstance(node, ast.FunctionDef) else ast.walk(node)
        functions += [each for each in found if isinstance(each, ast.FunctionDef | ast.Lambda)]
    methods = (
        each for each in functions if "staticmethod" not in map(ast.unparse, getattr(each, "decorator_list", ()))
    )
    return {method.args.args[0].arg for method in methods if method.args.args}


def _attributes(tree: ast.AST) -> Iterator[tuple[str, str, ast.Attribute]]:
    """Yield (name, attribute, node) for every `name.attribute` that is read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and isinstance(node.value, ast.Name):
            yield node.value.id, node.attr, node


def _constants(call: ast.Call) -> set[str]:
    """Return the names in getattr(self, "key") and attrgetter("key")."""
    if not (isinstance(call.func, ast.Name) and call.func.id in {"getattr", "attrgetter"}):
        return set()
    return {node.value for node in call.args if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def _passes_self(call: ast.Call, names: set[str]) -> bool:
    """Return whether the object itself is among the arguments of a call."""
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    return any(isinstance(node, ast.Name) and node.id in names for node in arguments)


def _reads_all(call: ast.Call, names: set[str], cls: type[Any]) -> bool:
    """Return whether a call can read any field, as vars(self), getattr(self, name) or another package's function."""
    if not _passes_self(call, names):
        return False
    name = ast.unparse(call.func)
    if name.rpartition(".")[2] in WHOLE:
        return True
    if name == "getattr":
        return not _constants(call)
    root = name.partition(".")[0]
    if root in names or root == "super()" or hasattr(builtins, root):
        return False
    called: Any = getattr(sys.modules.get(cls.__module__), root, None)
    return _home(called).partition(".")[0] not in HARMLESS | {cls.__module__.partition(".")[0]}


def _home(called: Any) -> str:
    """Return the name of the module that a function or class was written in, "" if that cannot be seen.

    On Python 3.13 attrs gives each of its classes `evolve` as a method, and `evolve.__module__` is the last one's.
    """
    if isinstance(called, ModuleType):
        return called.__name__
    written: dict[str, Any] = getattr(called, "__globals__", {})
    return written.get("__name__") or getattr(called, "__module__", None) or ""


def _handed_on(tree: ast.AST, names: set[str]) -> bool:
    """Return whether the object is used as a whole, not only its attributes, so that other code can read its fields."""
    owners = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    loaded = (node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load))
    return any(node.id in names and id(node) not in owners for node in loaded)


def _package(cls: type[Any]) -> list[ModuleType]:
    """Return the imported modules of the package that a class is in."""
    top = cls.__module__.partition(".")[0]
    return [m for name, m in list(sys.modules.items()) if name == top or name.startswith(f"{top}.")]


def _mentioned(module: ModuleType) -> set[str]:
    """Return the names of all attributes that a module reads without calling them."""
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError, SyntaxError):
        return set()
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {name for _, name, node in _attributes(tree) if id(node) not in called}
