"""Writes one safetensors file a tensor at a time, so that a large model is never in memory as a whole.

The format: the length of a JSON header as 8 bytes, the header, and the tensors' bytes in its order
(https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""What safetensors calls torch's dtypes."""
ALIGNED = 8
"""The tensors start at a multiple of this many bytes, as where safetensors itself writes them."""


@frozen
class Described:
    """A tensor of which only the dtype and the shape are known yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    file: Path,
    described: Mapping[str, Described],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write tensors to `file`; `read(name)` is called for one after the other.

    The widest dtypes come first, as safetensors orders them, so that every tensor starts at a multiple of its width.
    """
    order = sorted(described, key=lambda name: (-described[name].dtype.itemsize, name))
    with file.open("wb") as opened:
        opened.write(_header(order, described, metadata))
        for name in order:
            tensor = read(name)
            wanted = described[name]
            assert (tensor.dtype, tuple(tensor.shape)) == (wanted.dtype, wanted.shape), f"{name} is not as described"
            opened.write(_bytes(tensor))
        opened.flush()
        os.fsync(opened.fileno())


def _header(order: list[str], described: Mapping[str, Described], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    start = 0
    for name in order:
        each = described[name]
        end = start + each.size
        dtype = NAMES[str(each.dtype).removeprefix("torch.")]
        content[name] = {"dtype": dtype, "shape": list(each.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> Any:
    """Return the bytes of a tensor, as an array on its memory where it is in main memory already."""
    import torch

    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
