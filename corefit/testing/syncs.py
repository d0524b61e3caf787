"""Host syncs: code that reads a tensor's value, for which the CPU must wait until the device has computed it.

On the CPU nothing waits, so they are found by what is called: every call of torch is looked at, and what is computed
from tensors that are on the device in training counts as on the device, wherever it is here.
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
"""Names of calls, where they are not what a user typed."""
READS = {
    *("_local_scalar_dense", "equal", "allclose", "nonzero", "masked_select", "bincount", "_linalg_check_errors"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive"),
}
"""Operators of torch that give the host a value, or a tensor whose size depends on values."""
ONLY_ON_CPU = {"one_hot", "quantile", "nanquantile"}
"""Calls that look at values on the CPU alone, to check them."""
READING = {"tolist", "numpy", "__array__", "__repr__", "__format__"}
"""Calls that read values without an operator of torch."""


@define(eq=False)
class Reads:
    """What was called that reads values on the host, and where."""

    own: Sequence[object]
    """Objects whose methods are not looked at."""
    found: list[str] = field(factory=list[str])

    def note(self, call: str) -> None:
        """Note a call, with the file and line it was made from, unless one of `own` made it."""
        place = ""
        for frame in _frames():
            me = frame.f_locals.get("self")
            if any(me is each for each in self.own):
                return
            place = place or _place(frame)
        said = f"{WORDS.get(call, f'{call}()')} at {place}"
        if said not in self.found:
            self.found.append(said)

    def expect_none(self, fix: str) -> None:
        """AssertionError that says what was read, and `fix`."""
        expect(
            not self.found,
            f"{'; '.join(self.found[:3])} makes the host wait for the device in every step. {fix}",
        )


@contextmanager
def watched(values: object, own: Sequence[object] = ()) -> Generator[Reads]:
    """Note where a value of the tensors in `values`, or of what is computed from them, is read on the host."""
    reads = Reads([each for each in own if each is not None])
    for tensor in _tensors(values):
        setattr(tensor, MARK, True)
    functions, operators = _modes()
    calls = functions(reads)
    with operators(reads, calls), calls:
        yield reads


def _frames() -> Iterator[FrameType]:
    """From where a call was made outwards."""
    frame = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        yield frame
        frame = frame.f_back


def _place(frame: FrameType) -> str:
    """File and line of the first frame that is a user's; empty for torch's own and for this file's."""
    import torch

    path = Path(frame.f_code.co_filename)
    if path == Path(__file__) or Path(torch.__file__).parent in path.parents:
        return ""
    return f"{path.name}:{frame.f_lineno}"


def _tensors(value: object, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor in a value: containers, attrs classes and plain objects are looked into."""
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


def _given(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments of a call, in lists too."""
    import torch

    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _given(value)


def _marked(values: Iterable[Any]) -> bool:
    return any(MARK in tensor.__dict__ for tensor in _given(values))


def _moved(call: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool | None:
    """Whether a call puts its result on a device that it names (True) or on the host (False)."""
    import torch

    named = kwargs.get("device")
    if call == "to" and named is None:
        named = next((each for each in args[1:] if isinstance(each, str | torch.device)), None)
    if call == "cpu" or (named == "cpu" and isinstance(named, str)):
        return False
    return True if named is not None else None


def _masked(call: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operator's result has a size that depends on the values of a mask or of counts."""
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
    """Made on first use, because torch is not imported to read this module."""
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Calls(TorchFunctionMode):
        """Calls of torch's functions: what they are called, and whether they are given what is on the device."""

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
                for tensor in _given([result]):
                    setattr(tensor, MARK, True)
            return result

    class Operators(TorchDispatchMode):
        """Operators that those calls end in."""

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
