"""The package itself: what plugins import from it is there, and is imported only for those who ask."""

from __future__ import annotations

import subprocess
import sys

import pytest

import corefit
from corefit.plugins import hookspecs
from corefit.types import objective


@pytest.mark.parametrize("name", corefit.__all__)
def test_every_name_is_there(name: str) -> None:
    assert name in dir(corefit)
    assert getattr(corefit, name) is not None


def test_names_are_those_of_their_modules() -> None:
    assert corefit.hookimpl is hookspecs.hookimpl
    assert corefit.Objective is objective.Objective
    assert corefit.Batch is corefit.types.Batch
    assert corefit.errors.CorefitError is not None


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Bacth'"):
        _ = corefit.Bacth
    with pytest.raises(ImportError):
        exec("from corefit import Bacth")


SLOW = ("attrs", "pluggy", "importlib.metadata", "cattrs", "json", "numpy", "rich", "torch", "corefit.types")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_is_said_without_plugins(arguments: list[str]) -> None:
    """And without what they take, so that it comes at once."""
    said = (
        f"import sys\nfrom corefit.cli import main\nsys.argv = ['corefit', *{arguments}]\n"
        "try:\n    main()\nexcept SystemExit as ended:\n"
        f"    print('\\nended', ended.code, {{*{SLOW}}} & {{*sys.modules}})\n"
    )
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "ended 0 set()"
