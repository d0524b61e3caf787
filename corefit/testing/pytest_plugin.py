"""`pytest --corefit my_package` makes a test for each class that a plugin offers.

The keys of each class are checked, and an instance of it with default keys. Backbones, which need weights, and classes
with keys that have no default are reported as skipped, with the call to write in a test of your own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--corefit",
        action="append",
        default=[],
        metavar="PLUGIN",
        help="Check everything that a corefit plugin offers: its entry point or distribution, or a local file.",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Collect nothing from folders unless they are named; the checks are the tests."""
    plugins: list[str] = session.config.getoption("--corefit") or []
    for plugin in plugins:
        _offers(plugin)  # raises UsageError in the main process; pytest-xdist swallows those of its workers
    if plugins and not session.config.option.file_or_dir:
        session.config.args = []


def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    plugins: list[str] = session.config.getoption("--corefit") or []
    for offer in (offer for plugin in plugins for offer in _offers(plugin)):
        items.append(Check.from_parent(session, name=f"{offer.kind}.{offer.name}", offer=offer))


@cache
def _offers(plugin: str) -> Sequence[Any]:
    """Return everything that a plugin offers; raise UsageError if it cannot be read or offers nothing."""
    from corefit.errors import PluginError
    from corefit.plugins.host import Host

    try:
        host = Host()
        if plugin.endswith(".py"):
            host.add_file(Path(plugin))
    except PluginError as error:
        raise pytest.UsageError(f"--corefit {plugin}: {error}") from error
    found = [offer for offers in host.offers.values() for offer in offers.values() if _is_of(offer, plugin)]
    if not found:
        raise pytest.UsageError(
            f"--corefit {plugin}: it offers nothing; a file needs a function marked @corefit.hookimpl, such as "
            "corefit_objectives, and a package its entry point in the group corefit"
        )
    return found


def _is_of(offer: Any, plugin: str) -> bool:
    """Return whether an offer comes from the distribution, package or file `plugin`."""
    plain = plugin.replace("-", "_")
    package = offer.cls.__module__.partition(".")[0]
    return offer.owner.split()[0].replace("-", "_") == plain or package == plain or offer.owner == str(Path(plugin))


class Check(pytest.Item):
    """Checks an instance of one offered class, made with its default keys."""

    def __init__(self, *, offer: Any, **rest: Any) -> None:
        super().__init__(**rest)
        self.offer = offer

    def runtest(self) -> None:
        import attrs

        from corefit import testing
        from corefit.plugins.kinds import KINDS
        from corefit.testing.keys import check_keys

        kind, cls = KINDS[self.offer.kind], self.offer.cls
        try:
            check_keys(cls, kind.protocol)
        except AssertionError as error:
            raise AssertionError(f"{cls.__name__}: {error}") from error
        missing = [f.alias for f in attrs.fields(cls) if f.init and f.default is attrs.NOTHING]
        call = kind.check.format(cls=cls.__name__, keys=", ".join(f"{key}=..." for key in missing))
        advice = f"all keys of {self.name} are read, but {{}}: write a test that calls {call}"
        if kind.key == "backbones":
            pytest.skip(advice.format("its check needs weights"))
        if missing:
            pytest.skip(advice.format(f"{' and '.join(missing)} must be given"))
        try:
            instance = cls()
        except ValueError as error:
            pytest.skip(advice.format(f"its defaults do not make one ({error})"))
        check: Callable[[Any], None] = getattr(testing, kind.check.partition("(")[0])
        try:
            check(instance)
        except (ValueError, LookupError) as error:
            if not kind.reads:
                raise
            pytest.skip(advice.format(f"it refuses what the check gives it ({type(error).__name__}: {error})"))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        """Show the message of a check without its traceback."""
        return str(excinfo.value) if excinfo.errisinstance(AssertionError) else str(super().repr_failure(excinfo))

    def reportinfo(self) -> tuple[str, int | None, str]:
        return self.offer.cls.__module__, None, f"{self.offer.owner}: {self.name}"
