"""How many rows at once a backbone encodes and decodes: as many as fit into the memory of the device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

from attrs import define, evolve, field

from corefit.system import memory
from corefit.system.fakes import faked, materialize
from corefit.types import Backbone, SizedDecoder

if TYPE_CHECKING:
    from torch import Tensor

SHARE = 0.4
"""Share of a device's memory that what is computed of the rows may take. The rest is for weights, which may be all that
encoding needs, or those of a network that trains."""
TILES = (512, 256)
"""Sides of tiles that are proposed, in pixels."""
SMALL = 0.05
"""No estimate is made of rows that could not take more than this share of the memory."""
MOST = {"encode": 1 << 12, "decode": 1 << 16}
"""Bytes that no VAE takes for a number of media, and for one of latents. FLUX's takes 0.8 KiB and 15 KiB."""

SHORT = {"encode": (17, 25), "decode": (3, 4)}
"""Frames of media, and of latents, of two short clips. The former less 1 are divided by 8, as video VAEs need it."""
LONG = {"encode": 33, "decode": 5}
"""Frames up to which a clip is no long one."""


def fitting(rows: int, each: int | None, total: float) -> int:
    """Return how many rows to take at once, of which each takes `each` bytes, on a device of `total` bytes.

    Nothing but these decides, so that the same command on the same machine gives equal bits whatever else runs there.
    """
    return max(1, min(rows, int(SHARE * total / each))) if each else rows


def row_bytes(backbone: Backbone, what: str, shape: Sequence[int]) -> int | None:
    """Return the most bytes that encoding or decoding one row holds, besides weights; None where that is not known.

    No weight is read: the VAE is made of fake tensors. A video VAE goes through a clip piece by piece, so what a long
    clip takes is told by two short ones, which takes a tenth of the time.

    what   "encode" or "decode"
    shape  that of a row of media, or of latents
    """
    channels, *size = shape
    if len(size) < 3 or size[0] <= LONG[what]:
        return _peak(backbone, what, shape)
    few, more = ((frames, _peak(backbone, what, (channels, frames, *size[1:]))) for frames in SHORT[what])
    if few[1] is None or more[1] is None:
        return None
    return more[1] + (size[0] - more[0]) * (more[1] - few[1]) // (more[0] - few[0])


def _peak(backbone: Backbone, what: str, shape: Sequence[int]) -> int | None:
    import torch

    if not isinstance(backbone, SizedDecoder):
        return None
    blank: Any = evolve(backbone)  # pyright: ignore[reportArgumentType]
    blank.place(torch.device("cpu"), torch.float32)
    vae = blank.load_blank_decoder()

    def run() -> int:
        materialize(vae)
        with torch.no_grad(), memory.track_live_bytes() as held:
            given = torch.empty(1, *shape)
            getattr(blank, what)(given)
        return held.peak

    return faked(run)


def smaller(backbone: Backbone, size: Sequence[int]) -> list[str]:
    """Return what would help where one row of media of `size` does not fit: smaller tiles of the VAE, if it has any."""
    found = next((tile for tile in TILES if tile < max(size[-2:])), None)
    return [f"backbone.tile = {found}"] if found and getattr(backbone, "tile", 0) is None else []


@define(eq=False)
class Coder:
    """Encodes and decodes rows of media with a backbone, in parts that fit into the memory of the device.

    How many rows are a part is estimated. Where memory runs out all the same, it is halved until it fits. Parts change
    nothing but how results are rounded.

    say  receives a sentence whenever fewer rows are taken at once than were asked for
    """

    backbone: Backbone
    say: Callable[[str], None] = lambda text: None
    _rows: dict[Hashable, int] = field(init=False, factory=dict[Hashable, int])
    """What is coded and the shape of a row -> how many of them fit, however many the first batch had."""
    _unsaid: dict[Hashable, str] = field(init=False, factory=dict[Hashable, str])
    """The estimates by which they were found, until they are said."""

    def encode(self, media: Tensor) -> Tensor:
        """Do what the backbone's `encode` does."""
        return self._in_parts("encode", media)

    def decode(self, x0: Tensor) -> Tensor:
        """Do what the backbone's `decode` does, without a graph."""
        return self._in_parts("decode", x0)

    def _in_parts(self, what: str, given: Tensor) -> Tensor:
        import torch

        call: Callable[[Tensor], Tensor] = getattr(self.backbone, what)
        while True:
            rows = self._at_once(what, given)
            try:
                parts = [call(part) for part in given.split(rows)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except (MemoryError, RuntimeError) as error:
                if rows == 1 or not memory.is_exhausted(error):
                    raise
            self._lower(what, given, rows)

    def _at_once(self, what: str, given: Tensor) -> int:
        """Return how many rows to take at once, of all that are given."""
        key, asked = (what, *given.shape[1:]), len(given)
        if key not in self._rows:
            total = memory.total()
            if asked == 1 or asked * given[0].numel() * MOST[what] < SMALL * total:
                return asked
            each = row_bytes(self.backbone, what, given.shape[1:])
            self._rows[key] = fitting(sys.maxsize, each, total)
            self._unsaid[key] = f"({memory.size(each)} each, of {memory.size(int(total))})" if each else ""
        if self._rows[key] < asked and (why := self._unsaid.pop(key, "")):
            self.say(f"{what}: {self._rows[key]} of {asked} at once {why}")
        return min(self._rows[key], asked)

    def _lower(self, what: str, given: Tensor, rows: int) -> None:
        """Take half as many rows from now on; memory has run out."""
        import torch

        key = (what, *given.shape[1:])
        self._rows[key] = rows // 2
        self._unsaid.pop(key, None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.say(f"{what}: out of memory with {rows} at once; {rows // 2} from now on")
