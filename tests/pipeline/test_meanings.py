"""The meaning of a key is the sentence that its class gives it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from corefit.pipeline.meanings import meanings

SOURCE = '''
from attrs import frozen


@frozen
class Base:
    """A plugin.

    path   the folder; a name that is too long for one line goes on
           in the next
    """

    path: str
    scale: float = 1.0
    """Of the base."""


@frozen
class Derived(Base):
    scale: float = 2.0
    """Factor of
    the score."""
    bare: int = 0
    other = 1
    """Not a key: it has no type."""
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    file = tmp_path / "keys_of_a_plugin.py"
    file.write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, file.stem, raising=False)
    return __import__(file.stem)


def test_the_docstring_of_an_attribute_or_the_line_of_a_class_is_the_meaning(module: ModuleType) -> None:
    path = "The folder; a name that is too long for one line goes on in the next."
    assert meanings(module.Base) == {"path": path, "scale": "Of the base."}
    assert meanings(module.Derived) == {"path": path, "scale": "Factor of the score."}


def test_a_class_without_source_has_no_meanings() -> None:
    made = type("Made", (), {"__module__": "nowhere"})
    assert meanings(made) == {}
    assert meanings(int) == {}
