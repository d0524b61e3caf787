"""`pytest --corefit my_package`: every check for everything that a plugin offers and that its defaults can make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

CHECKS: Mapping[str, str] = {
    "objectives": "check_objective",
    "samplers": "check_sampler",
    "noise_weightings": "check_noise",
    "rewards": "check_reward",
}
"""Kinds whose plugins are checked as their defaults make them; backbones and sources need files, and a test."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--corefit",
        action="append",
        default=[],
        metavar="PLUGIN",
        help="Check everything that a corefit plugin offers: its entry point or distribution, or a local file.",
    )


def pytest_collection(session: pytest.Session) -> None:
    """Nothing is collected from folders unless they are named: the checks are the tests."""
    if session.config.getoption("--corefit") and not session.config.invocation_params.args:
        session.config.args = []


def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    asked: list[str] = session.config.getoption("--corefit") or []
    for name in asked:
        items.extend(_items(session, name))


def _items(session: pytest.Session, plugin: str) -> Iterator[pytest.Item]:
    from corefit.plugins import Host

    host = Host()
    if plugin.endswith(".py"):
        host.add_file(Path(plugin))
    found = [offer for offers in host.offers.values() for offer in offers.values() if _is_of(offer, plugin)]
    if not found:
        raise pytest.UsageError(f"--corefit {plugin}: no installed plugin of that name offers anything")
    for offer in found:
        if offer.kind in CHECKS:
            yield Check.from_parent(session, name=f"{offer.kind}.{offer.name}", offer=offer)


def _is_of(offer: Any, plugin: str) -> bool:
    """Whether an offer is of the distribution, package or file `plugin`."""
    plain = plugin.replace("-", "_")
    package = offer.cls.__module__.partition(".")[0]
    return offer.owner.split()[0].replace("-", "_") == plain or package == plain or offer.owner == str(Path(plugin))


class Check(pytest.Item):
    """One offer, made from its defaults and checked."""

    def __init__(self, *, offer: Any, **rest: Any) -> None:
        super().__init__(**rest)
        self.offer = offer

    def runtest(self) -> None:
        import attrs

        from corefit import testing

        missing = [f.name for f in attrs.fields(self.offer.cls) if f.init and f.default is attrs.NOTHING]
        if missing:
            pytest.skip(f"{self.name} needs {', '.join(missing)}: write a test that calls {CHECKS[self.offer.kind]}")
        check: Callable[[Any], None] = getattr(testing, CHECKS[self.offer.kind])
        check(self.offer.cls())

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        """The check's own words, without its frames."""
        return str(excinfo.value) if excinfo.errisinstance(AssertionError) else str(super().repr_failure(excinfo))

    def reportinfo(self) -> tuple[str, int | None, str]:
        return self.offer.cls.__module__, None, f"{self.offer.owner}: {self.name}"
