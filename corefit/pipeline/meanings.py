"""What each key means, read from the source of its class: editors and docs/configuration.md show the same sentence."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Mapping
from functools import cache
from itertools import pairwise

LISTED = re.compile(r"^(\w+) {2,}(\S.*(?:\n {4,}\S.*)*)$", re.MULTILINE)
"""A key and what it means, as a line in the docstring of a class."""


def meanings(cls: type) -> Mapping[str, str]:
    """Key -> the docstring below the attribute, or the key's line in the docstring of the class, on one line.

    Base classes count too. A class whose source cannot be read has no meanings.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        if node := _classes(base.__module__).get(base.__name__):
            found |= {key: _sentence(text) for key, text in LISTED.findall(ast.get_docstring(node) or "")}
            for attribute, below in pairwise(node.body):
                match attribute, below:
                    case ast.AnnAssign(target=ast.Name(id=key)), ast.Expr(value=ast.Constant(value=str(text))):
                        found[key] = text
                    case _:
                        pass
    return {key: " ".join(text.split()) for key, text in found.items()}


@cache
def _classes(module: str) -> Mapping[str, ast.ClassDef]:
    """The classes that a module defines at its top, as syntax trees."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, KeyError, TypeError):
        return {}
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _sentence(text: str) -> str:
    """With a capital, unless it begins with code, and a full stop."""
    first = text.partition(" ")[0]
    return (text.capitalize()[0] if first.isalpha() else text[0]) + text[1:] + ("" if text.endswith(".") else ".")
