"""Finds host syncs: code that reads a tensor's value, for which the CPU must wait until the device has computed it.

The checks run on the CPU, where nothing waits, so syncs are found by intercepting every call of torch. Tensors that are
on the device in training are marked, and so is everything that is computed from them; reading a marked one is a sync.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import attrs
from attrs import define, field

from corefit.testing.checks import expect

if TYPE_CHECKING:
    from torch import Tensor

MARK = "_corefit_on_device"
WORDS: Mapping[str, str] = {
    "__bool__": "bool(tensor), as in `if tensor:`,",
    "__float__": "float(tensor)",
    "__int__": "int(tensor)",
    "__index__": "a tensor as a number",
    "__getitem__": "tensor[mask], or a tensor as an index,",
    "__setitem__": "tensor[mask] = tensor",
    "__array__": "numpy.asarray(tensor)",
    "__format__": "a tensor in a text",
    "__repr__": "a tensor in a text",
    "__contains__": "`in` of a tensor",
    "to": 'tensor.to("cpu")',
    "to device": "tensor.to(device) without non_blocking=True, of what was made on the CPU,",
    "tensor": "torch.tensor([tensor, ...])",
}
"""How a message writes a call whose name is not what a user typed."""
READS = {
    *("_local_scalar_dense", "equal", "allclose", "nonzero", "masked_select", "bincount", "_linalg_check_errors"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive"),
}
"""Operators of torch that return a value to the host, or a tensor whose size depends on values."""
ONLY_ON_CPU = {"one_hot", "quantile", "nanquantile"}
"""Calls that read values, to validate them, only if the tensor is on the CPU."""
READING = {"tolist", "numpy", "__array__", "__repr__", "__format__"}
"""Calls that read values without calling an operator of torch."""


@define(eq=False)
class Reads:
    """The calls that read values on the host, with file and line."""

    own: Sequence[object]
    """Objects of the kit and of others, whose methods may read values."""
    found: list[str] = field(factory=list[str])

    def note(self, call: str) -> None:
        """Record a call with the file and line that made it, unless a method of one of `own` made it."""
        place = ""
        for frame in _frames():
            me = frame.f_locals.get("self")
            if any(me is each for each in self.own):
                return
            place = place or _place(frame)
        entry = f"{WORDS.get(call, f'{call}()')} at {place}"
        if entry not in self.found:
            self.found.append(entry)

    def expect_none(self, fix: str) -> None:
        """Raise AssertionError with the calls that read values, and with `fix`, if there are any."""
        expect(
            not self.found,
            f"{'; '.join(self.found[:3])} makes the host wait for the device in every step. {fix}",
        )


@contextmanager
def watched(values: object, own: Sequence[object] = ()) -> Generator[Reads]:
    """Record where the block reads, on the host, a value of the tensors in `values` or computed from them."""
    reads = Reads([each for each in own if each is not None])
    for tensor in _tensors(values):
        setattr(tensor, MARK, True)
    functions, operators = _modes()
    calls = functions(reads)
    with operators(reads, calls), calls:
        yield reads


def _frames() -> Iterator[FrameType]:
    """Yield the frames of a call, from the innermost outwards."""
    frame = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        yield frame
        frame = frame.f_back


def _place(frame: FrameType) -> str:
    """Return the file and line of a frame, or "" if it is in torch or in this file."""
    import torch

    path = Path(frame.f_code.co_filename)
    if path == Path(__file__) or Path(torch.__file__).parent in path.parents:
        return ""
    return f"{path.name}:{frame.f_lineno}"


def _tensors(value: object, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield all tensors in a value, also inside containers, attrs classes and plain objects."""
    import torch

    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, str | bytes | int | float | type(None)):
        return
    seen.add(id(value))
    inside: Iterable[Any] = ()
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        inside = value.values()
    elif isinstance(value, list | tuple):
        inside = value
    elif attrs.has(type(value)):
        inside = [getattr(value, each.name, None) for each in attrs.fields(type(value))]
    elif hasattr(value, "__dict__"):
        inside = vars(value).values()
    for each in list(inside):
        yield from _tensors(each, seen)


def _arguments(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among the arguments of a call, also inside lists."""
    import torch

    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _arguments(value)


def _marked(values: Iterable[Any]) -> bool:
    return any(MARK in tensor.__dict__ for tensor in _arguments(values))


def _moved(call: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool | None:
    """Return True if a call puts its result on a device that it names, False for the host, None if it names none."""
    import torch

    named = kwargs.get("device")
    if call == "to" and named is None:
        named = next((each for each in args[1:] if isinstance(each, str | torch.device)), None)
    if call == "cpu" or (named == "cpu" and isinstance(named, str)):
        return False
    return True if named is not None else None


def _masked(call: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether the size of an operator's result depends on the values of a mask or of counts."""
    import torch

    if call == "repeat_interleave":
        return kwargs.get("output_size") is None
    if call not in {"index", "index_put", "index_put_"}:
        return False
    if call != "index" and args[2].numel() == 1:
        return False
    return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])


@cache
def _modes() -> tuple[Any, Any]:
    """Make the two modes that intercept torch, on first use, so that importing this module does not import torch."""
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Calls(TorchFunctionMode):
        """Intercepts calls of torch's functions, and marks the results of those with marked arguments."""

        def __init__(self, reads: Reads) -> None:
            super().__init__()
            self.reads, self.call = reads, ""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            call: str = getattr(func, "__name__", "")
            held, moved = _marked([*args, *kwargs.values()]), _moved(call, args, kwargs)
            listed = call == "tensor" and isinstance(args[0], list | tuple)
            if held and (moved is False or call in READING or listed):
                self.reads.note(call)
            if moved and not held and call in {"to", "cuda"} and not kwargs.get("non_blocking"):
                self.reads.note("to device")
            before, self.call = self.call, call if held and call not in ONLY_ON_CPU else ""
            try:
                result = func(*args, **kwargs)
            finally:
                self.call = before
            if (moved is None and held) or moved:
                if args and result is args[0] and not held:
                    result = result.view_as(result)
                for tensor in _arguments([result]):
                    setattr(tensor, MARK, True)
            elif held and args and result is args[0]:  # on a CPU it is there already
                result = result.view_as(result)
            return result

    class Operators(TorchDispatchMode):
        """Intercepts the operators that those calls run, some of which read values."""

        def __init__(self, reads: Reads, calls: Calls) -> None:
            super().__init__()
            self.reads, self.calls = reads, calls

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            name = str(func).split(".")[1]
            if self.calls.call and (name in READS or _masked(name, args, kwargs)):
                self.reads.note(self.calls.call)
            return func(*args, **kwargs)

    return Calls, Operators
