"""What a plugin does wrong names the plugin; its sys.exit() ends nothing."""

from __future__ import annotations

import sys

import pytest

from corefit.errors import PluginError
from corefit.plugins import Host
from corefit.types.blame import no_exit, no_missing_package, place, require_result

EXITS = """
import argparse

def plain():
    raise SystemExit

def deep():
    argparse.ArgumentParser().parse_args(["--none"])

def needs():
    import no_such_package
"""


@pytest.fixture
def module(tmp_path):
    (tmp_path / "ends.py").write_text(EXITS)
    host = Host(plugins=[])
    host.add_file(tmp_path / "ends.py")
    (found,) = [m for name, m in sys.modules.items() if name.startswith("corefit_local_ends_")]
    yield found
    del sys.modules[found.__name__]


def test_an_exit_names_the_innermost_line_of_a_plugin(module):
    with pytest.raises(PluginError, match=r"plugin file .*ends.py:5 called sys.exit\(\)"), no_exit():
        module.plain()
    with pytest.raises(PluginError, match=r"plugin file .*ends.py:8 called sys.exit\(2\)"), no_exit():
        module.deep()


def test_an_exit_of_anything_else_names_its_line():
    with pytest.raises(PluginError, match=r"test_blame.py:\d+ called sys.exit\(0\)"), no_exit():
        sys.exit(0)


def test_who_wraps_sys_exit_is_not_who_exits(monkeypatch):
    """As wandb does, once it is imported."""

    def exit(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(sys, "exit", exit)
    with pytest.raises(PluginError, match=rf"test_blame.py:{exit.__code__.co_firstlineno + 5} called"), no_exit():
        sys.exit(0)


def test_other_endings_are_left_as_they_are():
    with pytest.raises(KeyboardInterrupt), no_exit():
        raise KeyboardInterrupt
    with no_exit():
        pass


def test_places():
    assert place(Host).startswith("Host (")
    assert place(int) == "builtins.int"
    with pytest.raises(PluginError, match=r"uses of builtins.int is 3, not a name; fix it"):
        require_result(3, lambda value: isinstance(value, str), 4, "uses", "a name")


def test_a_missing_package_is_named_with_the_line_that_needs_it(module):
    named = pytest.raises(PluginError, match=r"ends.py:11: No module named 'no_such_package'; install the package")
    with named, no_missing_package():
        module.needs()
    with pytest.raises(ModuleNotFoundError), no_missing_package():
        import corefit.no_such_room  # noqa: F401  # pyright: ignore
