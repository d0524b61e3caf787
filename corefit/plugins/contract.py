"""Whether a class that a plugin offers, and what it declares and returns, are what its protocol says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs

from corefit.errors import PluginError
from corefit.plugins.kinds import KINDS
from corefit.types.blame import expect, place, returned
from corefit.types.former import FORMER
from corefit.types.objective import Objective
from corefit.types.values import MOST, Term

TAKEN = frozenset({"step", "lr", "seconds", "samples_per_second", "skipped"})
"""Names that the trainer logs under."""


def problems(cls: type, kind: str) -> Iterator[str]:
    """What an attrs class lacks of the protocol of its kind: members, and methods that take its arguments."""
    protocol = KINDS[kind].protocol
    fields = {field.name for field in attrs.fields(cls)}
    for name, wanted in _members(protocol):
        found = inspect.getattr_static(cls, name, None)
        if getattr(found, "__isabstractmethod__", False) or (found is None and name not in fields):
            yield f"it has no {_said(name, wanted)}"
        elif inspect.iscoroutinefunction(found):
            yield f"its {name} is a coroutine (async def), and is called without await"
        elif inspect.isfunction(wanted) and found is not None and not _takes(cls, name, found, wanted):
            yield f"its {name} does not take what it is given, {_said(name, wanted)}"


def declared(value: Any, kind: str) -> None:
    """PluginError for what an objective or a sampler declares of itself and is of another type than it must be."""
    for name, fine, wanted in DECLARED.get(kind, ()):
        try:
            said = getattr(value, name)
        except Exception as error:
            raise PluginError(
                f"{name} of {place(type(value))} fails ({type(error).__name__}: {error}); mend it"
            ) from error
        returned(said, fine, value, name, wanted)


def term(value: Any, objective: Objective[Any]) -> Term:
    """A term that an objective yielded; PluginError for anything else, or for a metric with a name of the trainer's."""
    returned(value, _is_term, objective, "a term", "a corefit.Term of a scalar tensor and a count")
    expect(value.total.requires_grad, objective, "yields a term whose total has no gradient: nothing would be learned")
    if taken := sorted(TAKEN & value.metrics.keys()):
        raise PluginError(f"{place(type(objective))} logs {taken[0]!r}, which is the trainer's; give it another name")
    return value


def _members(protocol: type) -> Iterator[tuple[str, Any]]:
    for name, value in vars(protocol).items():
        if (
            not name.startswith("_")
            and name not in FORMER
            and (inspect.isfunction(value) or isinstance(value, property))
        ):
            yield name, value


def _said(name: str, wanted: Any) -> str:
    """A method with its arguments, a property by its name."""
    if not inspect.isfunction(wanted):
        return name
    _, *arguments = inspect.signature(wanted).parameters
    return f"{name}({', '.join(arguments)})"


def _takes(cls: type, name: str, found: Any, wanted: Any) -> bool:
    """Whether a method can be called as the protocol's is; True for what does not say what it takes."""
    _, *parameters = inspect.signature(wanted).parameters.values()
    bare = isinstance(found, (staticmethod, classmethod))
    given = [None for p in parameters if p.default is p.empty]
    optional = {p.name: None for p in parameters if p.default is not p.empty}
    member: Any = getattr(cls, name)
    if not callable(member):
        return inspect.isdatadescriptor(found)  # a field or a property: what it gives is not known yet
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
    ),
    "samplers": (("stochastic", lambda value: isinstance(value, bool), "true or false"),),
}
"""What instances say of themselves: member, whether it is fine, what it must be."""
