"""Find, check and look up plugins. Every plugin error message is here.

Installed plugins are found through the entry-point group `corefit`, first-party ones too. The host walks the
entry points itself: pluggy's own loader stops at the first broken one and skips clashes in silence.
"""

from __future__ import annotations

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
"""What a plugin module may set: the version of the API that it is written for."""
DISABLE = "COREFIT_DISABLE"
HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("corefit_"))


@frozen(eq=False)
class Offer:
    """One class that a plugin offers under a name."""

    kind: str
    name: str
    cls: type
    owner: str
    """Distribution and version, or the local file."""


@frozen(eq=False)
class Found:
    """A plugin before it is registered: its name, who brought it, and the module or object itself."""

    name: str
    owner: str
    plugin: object
    remedy: str


class Host:
    """The plugins of one run. `Host()` finds the installed ones; `Host(plugins=[...])` takes objects instead.

    Raises PluginError, naming the distribution, for a broken import, a misspelt hook, a name offered twice, or an
    offer that is no attrs class.
    """

    def __init__(self, plugins: Iterable[object] | None = None, *, trace: Callable[[str], None] | None = None) -> None:
        self._trace = trace
        """Told of every hook that is called: arguments, owner, result."""
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        if trace:
            self._manager.add_hookcall_monitoring(lambda *_: None, self._traced)
        self.hook: Any = self._manager.hook
        """Calls a hook in every plugin: host.hook.corefit_stage_started(stage=..., state=...)."""
        self.offers: dict[str, dict[str, Offer]] = {kind: {} for kind in KINDS}
        self._owners: dict[str, str] = {}
        self.files: list[Path] = []
        """Local plugin files, in order."""
        for found in _installed() if plugins is None else [_given(p) for p in plugins]:
            self._register(found)

    def add_file(self, path: Path) -> None:
        """Register a local Python file as a plugin."""
        if path.resolve() in self.files:
            return
        self.files.append(path.resolve())
        self._register(_local(path))

    def get(self, kind: str, name: str) -> type[Any]:
        """The class offered as `name`; kind is a key of KINDS. PluginError names what exists and the near miss."""
        offers = self.offers[kind]
        if name in offers:
            return offers[name].cls
        known = ", ".join(sorted(offers)) or "none"
        raise PluginError(
            f"no {KINDS[kind].name} is called {name!r}{near(name, offers)}; there are: {known}. "
            "Install the plugin that offers it, or name its file in `plugins = [...]`"
        )

    def name_of(self, kind: str, value: object) -> str:
        """The name under which the class of `value` is offered."""
        for name, offer in self.offers[kind].items():
            if offer.cls is type(value):
                return name
        return type(value).__name__

    def registered(self) -> list[object]:
        """Every plugin: a module, or the object that was given."""
        return [plugin for _, plugin in self._manager.list_name_plugin()]

    def owner_of(self, kind: str, value: object) -> str:
        """Who offers the class of `value`: distribution and version, or file."""
        offer = self.offers[kind].get(self.name_of(kind, value))
        return offer.owner if offer else type(value).__module__

    def step_metrics(self, stage: Any, state: Any, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics of a logged step, with those that plugins add; PluginError where two have one name."""
        every, owners = dict(metrics), dict.fromkeys(["step", *metrics], "the stage")
        for implementation in self.hook.corefit_step_metrics.get_hookimpls():
            plugin, given = implementation.plugin_name, {"stage": stage, "state": state, "metrics": metrics}
            who, known = (
                f"corefit_step_metrics() of {self._owners[plugin]}",
                {n: given[n] for n in implementation.argnames},
            )
            added = implementation.function(**known)
            if self._trace:
                self._trace(f"corefit_step_metrics({_shown(known)}) of {self._said(plugin)} -> {added}")
            if not isinstance(added, Mapping) or not all(map(_is_metric, added.items())):
                raise PluginError(f"{who} returned {added!r}, not a mapping of names to numbers; mend it")
            for name, value in added.items():
                if name in owners:
                    raise PluginError(f"{who} adds the metric {name!r}, which {owners[name]} has; give it another name")
                every[name], owners[name] = float(value), self._owners[plugin]
        return every

    def _traced(self, outcome: Any, hook: str, implementations: Sequence[Any], arguments: Mapping[str, Any]) -> None:
        """Tell of one call of a hook; pluggy begins with the plugin that was registered last."""
        names = ", ".join(self._said(each.plugin_name) for each in reversed(implementations)) or "nobody"
        failed = f" -> {outcome.exception!r}" if outcome.exception else ""
        if self._trace:
            self._trace(f"{hook}({_shown(arguments)}) of {names}{failed}")

    def _said(self, plugin: str) -> str:
        return f"{plugin} ({self._owners[plugin]})"

    def _register(self, found: Found) -> None:
        _refuse_misspelt(found)
        _refuse_other_api(found)
        try:
            self._manager.register(found.plugin, name=found.name)
            self._owners[found.name] = found.owner
            self._manager.check_pending()
            for kind in KINDS:
                self._take(found, kind)
        except pluggy.PluginValidationError as error:
            raise PluginError(f"plugin {found.name!r} of {found.owner}: {error}; {found.remedy}") from error

    def _take(self, found: Found, kind: str) -> None:
        """Index what one plugin offers of one kind."""
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
    """PluginError unless it is an attrs class that has all members of its kind."""
    if not isinstance(name, str):
        raise PluginError(f"{where} offers the name {name!r}, which is no text; mend it. Until then, {found.remedy}")
    if not (isinstance(cls, type) and attrs.has(cls)):
        raise PluginError(
            f"{where} offers {name!r}, which is {cls!r} and no attrs class; decorate the class with "
            f"@attrs.frozen, its fields are its configuration. Until then, {found.remedy}"
        )
    former.adopt(cls)
    if wrong := "; ".join(contract.problems(cls, kind)):
        raise PluginError(
            f"{where} offers {name!r}, {blame.place(cls)}, which is no {KINDS[kind].name}: {wrong}. Write what "
            f"corefit.{KINDS[kind].protocol.__name__} says; until then, {found.remedy}"
        )


def _shown(arguments: Mapping[str, Any]) -> str:
    """Arguments of an observer's hook: a stage by its name, a state by its step."""
    words = {"stage": lambda stage: stage.name, "state": lambda state: f"step {state.step}"}
    return ", ".join(f"{name}={words.get(name, str)(value)}" for name, value in arguments.items())


def _is_metric(item: tuple[object, object]) -> bool:
    """A name, and a number of Python's or numpy's that a float can hold."""
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
            f"{DISABLE} names {name!r}, and no installed plugin is called so{near(name, [p.name for p in points])}; "
            f"there are: {', '.join(p.name for p in points)}"
        )
    seen: dict[str, str] = {}
    for point in points:
        if point.name in disabled:
            continue
        owner = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
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
    """Import a file under a name of its own, so that its classes resolve their annotations."""
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
            f"plugin file {where} cannot be run ({type(error).__name__}: {error}); mend it, or remove it from `plugins`"
        ) from error
    return Found(name, str(path), module, "remove it from `plugins`")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # of a name that is too long
        return False


class _Uncached(SourceFileLoader):
    """Leaves no __pycache__ beside a user's file."""

    def set_data(self, path: str, data: Any, *, _mode: int = 0) -> None:
        pass


def _line_in(path: Path, error: BaseException) -> str:
    """':12' where the error passed through the file, or nothing."""
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


def _refuse_misspelt(found: Found) -> None:
    """Every function marked as a hook, and every one that is named like a hook, must be one."""
    for attribute in dir(found.plugin):
        value = getattr(found.plugin, attribute, None)
        marked = callable(value) and getattr(value, "corefit_impl", None) is not None
        if attribute in HOOKS:
            if callable(value) and not marked and not isinstance(value, pluggy.HookCaller):
                raise PluginError(
                    f"plugin {found.name!r} of {found.owner}: {attribute}() is not marked; decorate it with "
                    f"@corefit.hookimpl. Until then, {found.remedy}"
                )
        elif marked:
            raise PluginError(
                f"plugin {found.name!r} of {found.owner} implements {attribute!r}, which is no hook"
                f"{near(attribute, HOOKS)}; the hooks are: {', '.join(HOOKS)}. Until then, {found.remedy}"
            )


def _refuse_other_api(found: Found) -> None:
    """A plugin may say which version of corefit's API it is written for: COREFIT_API = "1"."""
    built = getattr(found.plugin, API, None)
    if built is not None and str(built).partition(".")[0] != hookspecs.API_VERSION.partition(".")[0]:
        raise PluginError(
            f"plugin {found.name!r} of {found.owner} is written for version {built} of corefit's API, and this corefit "
            f"has {hookspecs.API_VERSION}; install a release of one for the other. Until then, {found.remedy}"
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
