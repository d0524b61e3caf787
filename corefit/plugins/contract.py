"""Checks that a class that a plugin offers has the members of its protocol, and gives values of the right type."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs

from corefit.errors import PluginError
from corefit.plugins.kinds import KINDS
from corefit.types.blame import place, require, require_result
from corefit.types.former import FORMER
from corefit.types.objective import Objective, free_chunks, unknown_uses
from corefit.types.values import MOST, ROUNDING, Moving, Term

RESERVED = frozenset({"step", "lr", "seconds", "samples_per_second", "skipped", "alarm"})
"""Names of metrics that the trainer logs."""


OF_ENTRIES = frozenset({"name", "weight", "normalize"})
"""Keys that every entry of a list of rewards has beside the reward's own."""

ADDED = frozenset(
    {"Reward.check", "checkpoint", "chunks", "concurrent", "copies", "differentiable", "left_out", "unit"}
)
"""Members of a protocol, and arguments of its methods, that came after version 0.1; a plugin need not have them."""


def problems(cls: type, kind: str) -> Iterator[str]:
    """Yield a message for each member of the protocol that an attrs class lacks or that takes other arguments."""
    protocol = KINDS[kind].protocol
    fields = {field.name for field in attrs.fields(cls)}
    for name, wanted in _members(protocol):
        found = inspect.getattr_static(cls, name, None)
        if getattr(found, "__isabstractmethod__", False) or (found is None and name not in fields):
            yield f"it has no {_signature(name, wanted)}"
        elif inspect.iscoroutinefunction(found):
            yield f"its {name} is a coroutine (async def), but corefit calls it without await; write a plain method"
        elif inspect.isfunction(wanted) and found is not None and not _accepts(cls, name, found, wanted):
            yield f"its {name} does not accept the arguments of {_signature(name, wanted)}"
    for name in vars(protocol).get("__annotations__", {}):
        if name not in fields | ADDED | _used(cls) and not hasattr(cls, name):
            yield f"it has no {name}"
    taken = {field.name for field in attrs.fields(cls) if field.init} & OF_ENTRIES if kind == "rewards" else ()
    for name in sorted(taken):
        yield f"its key {name!r} is one that every entry of a list of rewards has; give it another name"


def declared(value: Any, kind: str) -> None:
    """Raise PluginError if a property of an objective or a sampler fails, or has a wrong type or an unknown name."""
    for name, fine, wanted in DECLARED.get(kind, ()):
        if name in ADDED and not hasattr(type(value), name):
            continue
        try:
            found = getattr(value, name)
        except Exception as error:
            raise PluginError(
                f"{name} of {place(type(value))} fails ({type(error).__name__}: {error}); fix it"
            ) from error
        require_result(found, fine, value, name, wanted)
    for mistake in unknown_uses(value) if kind == "objectives" else ():
        require(False, value, mistake)
    for key in free_chunks(value) if kind == "objectives" else ():
        found = next((each for each in attrs.fields(type(value)) if each.name == key), None)
        free = found is not None and found.metadata.items() >= ROUNDING.items() and getattr(value, key) is None
        require(free, value, f"has {key!r} in `chunks`, which is no key of it that is marked ROUNDING and None")


def term(value: Any, objective: Objective[Any]) -> Term:
    """Return `value`, which an objective yielded; raise PluginError unless it is a term that the trainer can use."""
    require_result(value, _is_term, objective, "a term", "a corefit.Term of a scalar tensor and a count")
    require(value.total.requires_grad, objective, "yields a term whose total has no gradient: nothing would be learned")
    if reserved := sorted(RESERVED & value.metrics.keys()):
        raise PluginError(
            f"{place(type(objective))} logs {reserved[0]!r}, a name that the trainer uses; give the metric another name"
        )
    return value


def _members(protocol: type) -> Iterator[tuple[str, Any]]:
    """Yield the methods and properties of a protocol, without those that only carry a former name."""
    for name, value in vars(protocol).items():
        if (
            not name.startswith("_")
            and not {name, getattr(value, "__qualname__", name)} & {*FORMER, *ADDED}
            and (inspect.isfunction(value) or isinstance(value, property))
        ):
            yield name, value


def _used(cls: type) -> set[str]:
    """Return the names that the methods of a class read or set, as attributes that it need not declare."""
    methods = (member for each in cls.__mro__ for member in vars(each).values() if inspect.isfunction(member))
    return {name for method in methods for name in method.__code__.co_names}


def _signature(name: str, wanted: Any) -> str:
    """Return the name of a property, or of a method with its arguments."""
    if not inspect.isfunction(wanted):
        return name
    _, *arguments = inspect.signature(wanted).parameters
    return f"{name}({', '.join(arguments)})"


def _accepts(cls: type, name: str, found: Any, wanted: Any) -> bool:
    """Return whether a method can be called with the protocol's arguments; True if its signature is not known."""
    _, *parameters = inspect.signature(wanted).parameters.values()
    bare = isinstance(found, (staticmethod, classmethod))
    given = [None for p in parameters if p.default is p.empty]
    optional = {p.name: None for p in parameters if p.default is not p.empty and p.name not in ADDED}
    member: Any = getattr(cls, name)
    if not callable(member):
        return inspect.isdatadescriptor(found)  # a field or a property has no value without an instance
    try:
        inspect.signature(member).bind(*([] if bare else [None]), *given, **optional)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def _is_term(value: Any) -> bool:
    metrics: Any = value.metrics if isinstance(value, Term) else None
    fine = isinstance(value, Term) and _is_scalar(value.total) and isinstance(metrics, Mapping)
    return fine and (isinstance(value.count, (int, float)) or _is_scalar(value.count))


def _is_scalar(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.ndim == 0 and not value.is_complex()


def _is_names(value: Any) -> bool:
    return isinstance(value, (frozenset, set)) and all(isinstance(name, str) for name in value)  # pyright: ignore[reportUnknownVariableType]


def _are_copies(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and name.isidentifier() and isinstance(each, Moving)
        for name, each in value.items()  # pyright: ignore[reportUnknownVariableType]
    )


def _are_chunks(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and _is_count(each)
        for name, each in value.items()  # pyright: ignore[reportUnknownVariableType]
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST


COUNT = f"a whole number from 1 to {MOST}"
DECLARED: Mapping[str, tuple[tuple[str, Callable[[Any], bool], str], ...]] = {
    "objectives": (
        ("uses", _is_names, 'a set of names such as {"media", "noise"}'),
        ("num_terms", _is_count, COUNT),
        ("num_updates", _is_count, COUNT),
        ("group_size", _is_count, COUNT),
        ("rows_per_graph", _is_count, COUNT),
        ("copies", _are_copies, "a mapping of names such as 'old' to corefit.Moving"),
        ("chunks", _are_chunks, f"a mapping of keys to {COUNT}"),
    ),
    "optimizers": (
        ("shards", lambda value: value in ("no", "numbers", "blocks"), '"no", "numbers" or "blocks"'),
        ("lr", lambda value: isinstance(value, float), "a number"),
    ),
    "samplers": (("stochastic", lambda value: isinstance(value, bool), "true or false"),),
}
"""For each kind, the members that an instance declares: name, check of the value, and what messages say it must be."""
