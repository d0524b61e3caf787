"""A transformer in one safetensors file: with the names of diffusers, or with those of the original code."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from corefit.errors import ModelError
from corefit_backbones import original_names

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".safetensors"
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
"""What may stand before the names: files of whole models hold text encoders and VAE as well, which are not read."""


LONGEST = 10**8
"""Bytes of a header at most, as safetensors has it."""


@frozen
class SingleFile:
    """The file that the key `transformer` names.

    rules  gives the names of the family's original code for a number of layers
    """

    file: Path
    rules: Callable[[int], original_names.Rules]

    def check(self, networks: Sequence[str]) -> None:
        """Raise a ModelError if there is no such file, or if a model has more networks than one file can replace."""
        if len(networks) > 1:
            raise ModelError(
                f"transformer = '{self.file}': this model has {len(networks)} networks, {', '.join(networks)}, and one "
                "file replaces one; remove the key, and put the weights into a diffusers folder"
            )
        if self.file.suffix != SUFFIX or not self.file.is_file():
            what = "no such file" if self.file.suffix == SUFFIX else f"not a {SUFFIX} file"
            raise ModelError(f"transformer = '{self.file}': {what}; name the file with the transformer's weights")

    def header_key(self) -> str:
        """sha256 of the names, dtypes and shapes in the file; "" if there is no such file."""
        if not self.file.is_file():
            return ""
        with self.file.open("rb") as opened:
            length = min(int.from_bytes(opened.read(8), "little"), LONGEST)
            return hashlib.sha256(opened.read(length)).hexdigest()

    @contextmanager
    def stored(self, layers: int, shapes: Mapping[str, Sequence[int]]) -> Generator[Mapping[str, Any]]:
        """A context with the tensors of the file, by the names of diffusers; a slice is read when indexed.

        layers  number of layers of the network
        shapes  name -> shape of its tensors
        """
        from safetensors import SafetensorError, safe_open

        try:
            opened = safe_open(self.file, "pt")
        except (OSError, SafetensorError) as e:
            raise ModelError(f"{self.file}: damaged or incomplete ({e}); fetch it again") from e
        with opened as file:
            found = _within({name: file.get_slice(name) for name in file.keys()})  # noqa: SIM118
            yield _named(found, self.rules(layers), shapes)


def _within(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """The transformer's tensors of a file, without what stands before their names."""
    for prefix in PREFIXES:
        if own := {name.removeprefix(prefix): each for name, each in found.items() if name.startswith(prefix)}:
            return own
    return found


def _named(
    found: Mapping[str, Any], rules: original_names.Rules, shapes: Mapping[str, Sequence[int]]
) -> Mapping[str, Any]:
    """The tensors by the names of diffusers, which most of them have already unless the file has the original ones."""
    if shapes.keys() <= found.keys():
        return found
    made_of = original_names.arranged(shapes, rules)
    if len(found.keys() & shapes.keys()) >= len(found.keys() & made_of.keys()):
        return found
    named = {name: each for name, each in found.items() if name not in made_of}
    for original in made_of.keys() & found.keys():
        start, whole = 0, found[original]
        for part in made_of[original].parts:
            if made_of[original].swapped:
                named[part] = _Swapped(whole)
            elif len(made_of[original].parts) == 1:
                named[part] = whole
            else:
                named[part] = _Rows(whole, start, shapes[part][0])
                start += shapes[part][0]
    return named


@frozen
class _Rows:
    """Some rows of a tensor in a file, read like the tensors of safetensors."""

    whole: Any
    start: int
    length: int

    def get_shape(self) -> list[int]:
        rows, *rest = self.whole.get_shape()
        return [max(0, min(self.length, rows - self.start)), *rest]

    def __getitem__(self, rows: Any) -> Tensor:
        start, stop, _ = (slice(None) if rows is Ellipsis else rows).indices(self.length)
        return self.whole[self.start + start : self.start + stop]


@frozen
class _Swapped:
    """A tensor in a file with the halves of its rows in each other's place, read like the tensors of safetensors."""

    whole: Any

    def get_shape(self) -> list[int]:
        return self.whole.get_shape()

    def __getitem__(self, rows: Any) -> Tensor:
        whole: Tensor = self.whole[...]
        return whole.roll(len(whole) // 2, 0)[rows]
