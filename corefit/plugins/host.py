"""Find, check and look up plugins.

Installed plugins, corefit's own included, are found through the entry-point group `corefit`. The host loads the entry
points itself, because pluggy's loader stops at one that is broken and skips name clashes in silence.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from importlib.metadata import EntryPoint, entry_points
from numbers import Real
from pathlib import Path
from typing import Any

import attrs
import pluggy
from attrs import frozen

from corefit.errors import PluginError, near
from corefit.plugins import contract, hookspecs
from corefit.plugins.kinds import KINDS
from corefit.types import blame, former

GROUP = blame.GROUP
API = "COREFIT_API"
"""The variable in which a plugin module may name the version of the API that it is written for."""
DISABLE = "COREFIT_DISABLE"
HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("corefit_"))


@frozen(eq=False)
class Offer:
    """A class that a plugin offers under a name."""

    kind: str
    name: str
    cls: type
    owner: str
    """The distribution and version, or the local file, that the offer comes from."""


@frozen(eq=False)
class Found:
    """A plugin that was found and is not registered yet.

    owner   the distribution and version, or the local file, that it comes from
    plugin  the module, or the object that was passed to Host
    remedy  what messages advise for running without it
    """

    name: str
    owner: str
    plugin: object
    remedy: str


class Host:
    """Holds the plugins of one run. `Host()` finds the installed ones; `Host(plugins=[...])` takes objects instead.

    Raises PluginError, which names the distribution, for a broken import, a misspelled hook, a name that is offered
    twice, or an offer that is not an attrs class with all members of its protocol.
    """

    def __init__(self, plugins: Iterable[object] | None = None, *, trace: Callable[[str], None] | None = None) -> None:
        self._trace = trace
        """Receives a line for every call of a hook: arguments, owner, result."""
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        if trace:
            self._manager.add_hookcall_monitoring(lambda *_: None, self._traced)
        self.hook: Any = self._manager.hook
        """Calls a hook of all plugins: host.hook.corefit_stage_started(stage=..., state=...)."""
        self.offers: dict[str, dict[str, Offer]] = {kind: {} for kind in KINDS}
        self._owners: dict[str, str] = {}
        self.files: list[Path] = []
        """The local plugin files, in the order in which they were added."""
        for found in _installed() if plugins is None else [_given(p) for p in plugins]:
            self._register(found)

    def add_file(self, path: Path) -> None:
        """Register a local Python file as a plugin."""
        if path.resolve() in self.files:
            return
        self.files.append(path.resolve())
        self._register(_local(path))

    def get(self, kind: str, name: str) -> type[Any]:
        """Return the class offered as `name`; kind is a key of KINDS.

        Raises PluginError, which lists the names that exist and the closest one.
        """
        offers = self.offers[kind]
        if name in offers:
            return offers[name].cls
        known = ", ".join(sorted(offers)) or "none"
        raise PluginError(
            f"no {KINDS[kind].name} is called {name!r}{near(name, offers)}; there are: {known}. "
            "Install the plugin that offers it, or name its file in `plugins = [...]`"
        )

    def name_of(self, kind: str, value: object) -> str:
        """Return the name under which the class of `value` is offered, or else the name of the class."""
        for name, offer in self.offers[kind].items():
            if offer.cls is type(value):
                return name
        return type(value).__name__

    def registered(self) -> list[object]:
        """Return all plugins: modules, or the objects that were passed to Host."""
        return [plugin for _, plugin in self._manager.list_name_plugin()]

    def owner_of(self, kind: str, value: object) -> str:
        """Return the distribution and version, or the file, that offers the class of `value`, or else its module."""
        offer = self.offers[kind].get(self.name_of(kind, value))
        return offer.owner if offer else type(value).__module__

    def step_metrics(self, stage: Any, state: Any, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of a logged step and those that plugins add.

        Raises PluginError if a plugin adds a metric that exists already, or something that is not a metric.
        """
        result, owners = dict(metrics), dict.fromkeys(["step", *metrics], "the stage")
        arguments = {"stage": stage, "state": state, "metrics": metrics}
        for implementation in self.hook.corefit_step_metrics.get_hookimpls():
            plugin: str = implementation.plugin_name
            where = f"corefit_step_metrics() of {self._owners[plugin]}"
            passed = {name: arguments[name] for name in implementation.argnames}
            added = implementation.function(**passed)
            if self._trace:
                self._trace(f"corefit_step_metrics({_summary(passed)}) of {self._with_owner(plugin)} -> {added}")
            if not isinstance(added, Mapping) or not all(map(_is_metric, added.items())):
                raise PluginError(f"{where} returned {added!r}, not a mapping of names to numbers; fix it")
            for name, value in added.items():
                if name in owners:
                    raise PluginError(
                        f"{where} adds the metric {name!r}, which {owners[name]} logs already; give it another name"
                    )
                result[name], owners[name] = float(value), self._owners[plugin]
        return result

    def trace_call(self, what: str, arguments: Mapping[str, Any]) -> None:
        """Trace a call of an observer that a pipeline names."""
        if self._trace:
            self._trace(f"{what}({_summary(arguments)})")

    def _traced(self, outcome: Any, hook: str, implementations: Sequence[Any], arguments: Mapping[str, Any]) -> None:
        """Trace one call of a hook, with its plugins in order of registration (pluggy calls the newest first)."""
        names = ", ".join(self._with_owner(each.plugin_name) for each in reversed(implementations)) or "nobody"
        failed = f" -> {outcome.exception!r}" if outcome.exception else ""
        if self._trace:
            self._trace(f"{hook}({_summary(arguments)}) of {names}{failed}")

    def _with_owner(self, plugin: str) -> str:
        return f"{plugin} ({self._owners[plugin]})"

    def _register(self, found: Found) -> None:
        _refuse_misspelled(found)
        _refuse_other_api(found)
        try:
            self._manager.register(found.plugin, name=found.name)
            self._owners[found.name] = found.owner
            self._manager.check_pending()
            for kind in KINDS:
                self._add_offers(found, kind)
        except pluggy.PluginValidationError as error:
            raise PluginError(f"plugin {found.name!r} of {found.owner}: {error}; {found.remedy}") from error

    def _add_offers(self, found: Found, kind: str) -> None:
        """Index the classes of one kind that a plugin offers."""
        offer_hook = getattr(found.plugin, f"corefit_{kind}", None)
        if offer_hook is None or not getattr(offer_hook, "corefit_impl", None):
            return
        where = f"plugin {found.name!r} of {found.owner}, corefit_{kind}()"
        offers = _called(offer_hook, where, found)
        if self._trace:
            names = ", ".join(f"{name}: {getattr(cls, '__qualname__', cls)}" for name, cls in offers.items())
            self._trace(f"corefit_{kind}() of {found.name} ({found.owner}) -> {{{names}}}")
        for name, cls in offers.items():
            _check_offer(name, cls, kind, where, found)
            other = self.offers[kind].get(name)
            if other is not None:
                raise PluginError(
                    f"{KINDS[kind].name} {name!r} is offered twice, by {other.owner} and by {found.owner}; "
                    f"rename one, or {found.remedy}"
                )
            self.offers[kind][name] = Offer(kind, name, cls, found.owner)


def _check_offer(name: Any, cls: Any, kind: str, where: str, found: Found) -> None:
    """Raise PluginError unless an offer is a name and an attrs class with all members of its protocol."""
    if not isinstance(name, str):
        raise PluginError(
            f"{where} offers the name {name!r}, which is not a string; fix it. Until then, {found.remedy}"
        )
    if not (isinstance(cls, type) and attrs.has(cls)):
        raise PluginError(
            f"{where} offers {name!r}, which is {cls!r} and not an attrs class; decorate the class with "
            f"@attrs.frozen, because its fields are its keys. Until then, {found.remedy}"
        )
    former.adopt(cls)
    if wrong := "; ".join(contract.problems(cls, kind)):
        raise PluginError(
            f"{where} offers {name!r}, {blame.place(cls)}, which is not a valid {KINDS[kind].name}: {wrong}. Write the "
            f"members of corefit.{KINDS[kind].protocol.__name__}; until then, {found.remedy}"
        )


def _summary(arguments: Mapping[str, Any]) -> str:
    """Return the arguments of an observer's hook as a short text: a stage by its name, a state by its step."""
    words: Mapping[str, Callable[[Any], str]] = {
        "stage": lambda stage: stage.name,
        "state": lambda state: f"step {state.step}",
        "pipeline": lambda pipeline: pipeline.name,
        "scored": lambda scored: scored.name,
    }
    return ", ".join(f"{name}={words.get(name, str)(value)}" for name, value in arguments.items())


def _is_metric(item: tuple[object, object]) -> bool:
    """Return whether a pair is a name and a number, of Python or numpy, that a float can hold."""
    name, value = item
    number = isinstance(value, (int, float, Real)) and not isinstance(value, bool)
    return isinstance(name, str) and number and not (isinstance(value, int) and abs(value) > sys.float_info.max)


def _installed() -> Iterable[Found]:
    disabled = {name.strip() for name in os.environ.get(DISABLE, "").split(",") if name.strip()}
    points = sorted(entry_points(group=GROUP), key=lambda p: (p.name != "builtin", p.name, p.value))
    unknown = disabled - {p.name for p in points}
    if unknown:
        name = min(unknown)
        raise PluginError(
            f"{DISABLE} names {name!r}, but no installed plugin has that name{near(name, [p.name for p in points])}; "
            f"there are: {', '.join(p.name for p in points)}"
        )
    seen: dict[str, str] = {}
    # each look parses all that a distribution says of itself, its README included: once for all of its plugins
    owners = functools.cache(lambda distribution: f"{distribution.name} {distribution.version}")
    for point in points:
        if point.name in disabled:
            continue
        owner = owners(point.dist) if point.dist else point.value
        if point.name in seen:
            raise PluginError(
                f"two plugins are called {point.name!r}, of {seen[point.name]} and of {owner}; uninstall one of them"
            )
        seen[point.name] = owner
        yield _loaded(point, owner)


def _loaded(point: EntryPoint, owner: str) -> Found:
    remedy = f"set {DISABLE}={point.name} to run without it"
    try:
        return Found(point.name, owner, point.load(), remedy)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise PluginError(
            f"plugin {point.name!r} of {owner} cannot be imported ({type(error).__name__}: {error}); "
            f"reinstall or update {owner.split()[0]}, or {remedy}"
        ) from error


def _local(path: Path) -> Found:
    """Import a file under a unique module name, which lets attrs resolve the annotations of its classes."""
    if not _is_file(path):
        raise PluginError(f"plugins: there is no file {path}; paths are relative to the pipeline file")
    name = f"{blame.LOCAL}{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    loader = _Uncached(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None, "a loader of a file has a spec"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        where = f"{path}{_line_in(path, error)}"
        raise PluginError(
            f"plugin file {where} cannot be run ({type(error).__name__}: {error}); fix it, or remove it from `plugins`"
        ) from error
    return Found(name, str(path), module, "remove it from `plugins`")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long
        return False


class _Uncached(SourceFileLoader):
    """Loads a file without writing a __pycache__ beside it."""

    def set_data(self, path: str, data: Any, *, _mode: int = 0) -> None:
        pass


def _line_in(path: Path, error: BaseException) -> str:
    """Return ":12", the innermost line of the file that an error passed through, or "" if there is none."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f":{error.lineno}"
    lines = [tb for tb in _frames(error) if tb[0] == str(path)]
    return f":{lines[-1][1]}" if lines else ""


def _frames(error: BaseException) -> list[tuple[str, int]]:
    frames: list[tuple[str, int]] = []
    tb = error.__traceback__
    while tb is not None:
        frames.append((tb.tb_frame.f_code.co_filename, tb.tb_lineno))
        tb = tb.tb_next
    return frames


def _given(plugin: object) -> Found:
    name = getattr(plugin, "__name__", None) or type(plugin).__name__
    return Found(f"{name} at {id(plugin):#x}", f"the object {name!r}", plugin, "leave it out of Host(plugins=[...])")


def _refuse_misspelled(found: Found) -> None:
    """Raise PluginError for a function marked @hookimpl that is no hook, and for a hook without the mark."""
    for attribute in dir(found.plugin):
        value = getattr(found.plugin, attribute, None)
        marked = callable(value) and getattr(value, "corefit_impl", None) is not None
        if attribute in HOOKS:
            if callable(value) and not marked and not isinstance(value, pluggy.HookCaller):
                raise PluginError(
                    f"plugin {found.name!r} of {found.owner}: {attribute}() is not marked as a hook; decorate it with "
                    f"@corefit.hookimpl. Until then, {found.remedy}"
                )
        elif marked:
            raise PluginError(
                f"plugin {found.name!r} of {found.owner} implements {attribute!r}, which is not a hook"
                f"{near(attribute, HOOKS)}; the hooks are: {', '.join(HOOKS)}. Until then, {found.remedy}"
            )


def _refuse_other_api(found: Found) -> None:
    """Raise PluginError for a plugin that is written for another major version of the API: COREFIT_API = "1"."""
    built = getattr(found.plugin, API, None)
    if built is not None and str(built).partition(".")[0] != hookspecs.API_VERSION.partition(".")[0]:
        raise PluginError(
            f"plugin {found.name!r} of {found.owner} is written for version {built} of corefit's API, and this corefit "
            f"has {hookspecs.API_VERSION}; install releases of both that agree. Until then, {found.remedy}"
        )


def _called(offer_hook: Any, where: str, found: Found) -> Mapping[str, Any]:
    try:
        offers = offer_hook()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise PluginError(f"{where} failed ({type(error).__name__}: {error}); {found.remedy}") from error
    if not isinstance(offers, Mapping):
        raise PluginError(f"{where} returned {offers!r}, not a mapping of names to classes; {found.remedy}")
    return offers
