"""Sizes that media of other aspects go to: of about the same area, in steps that the model takes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from attrs import frozen

from corefit.errors import ConfigError, CorefitError

if TYPE_CHECKING:
    from corefit.types import Backbone

LARGEST_UNIT = 256
PART = re.compile(r"\d{1,5}")
"""Of an aspect."""
Size = tuple[int, ...]


@frozen
class Aspect:
    """Width to height, as "16:9" says it."""

    width: int
    height: int

    @staticmethod
    def of(text: str) -> Aspect:
        """ValueError for anything but two positive whole numbers with a colon between."""
        parts = text.split(":")
        if len(parts) != 2 or not all(PART.fullmatch(part.strip()) and int(part) for part in parts):
            raise ValueError(f"{text!r} is no aspect; write width:height, such as '4:3'")
        return Aspect(int(parts[0]), int(parts[1]))

    @property
    def ratio(self) -> float:
        return self.width / self.height


def sizes(size: Size, aspects: Sequence[str], backbone: Backbone) -> tuple[Size, ...]:
    """The buckets: `size` alone, or for each aspect the size of its area; frames stay.

    Height and width are rounded to the steps that `latent_shape` takes. ConfigError where it takes none near.
    """
    if not aspects:
        return (size,)
    *frames, height, width = size
    unit = _unit(size, backbone)
    found: dict[Size, str] = {}
    for text in aspects:
        ratio = Aspect.of(text).ratio
        side = math.sqrt(height * width)
        bucket = (*frames, _rounded(side / math.sqrt(ratio), unit), _rounded(side * math.sqrt(ratio), unit))
        if bucket in found:
            raise ConfigError(
                f"aspects: {found[bucket]!r} and {text!r} are both {bucket[-1]} x {bucket[-2]} pixels at this size; "
                "remove one"
            )
        try:
            backbone.latent_shape(bucket)
        except CorefitError as error:
            raise ConfigError(
                f"aspects: {text!r} at this size is {bucket[-1]} x {bucket[-2]} pixels: {error}"
            ) from None
        found[bucket] = text
    return tuple(found)


def nearest(height: int, width: int, sizes: Sequence[Size]) -> int:
    """Number of the bucket whose aspect is nearest to that of media of `height` and `width`."""
    wanted = math.log(width / height)
    return min(range(len(sizes)), key=lambda n: abs(math.log(sizes[n][-1] / sizes[n][-2]) - wanted))


def _unit(size: Size, backbone: Backbone) -> int:
    """The smallest step in pixels, a power of two, by which the model lets height and width grow or shrink."""
    backbone.latent_shape(size)
    *frames, height, width = size
    unit = 1
    while unit <= LARGEST_UNIT:
        for step in (unit, -unit):
            if _takes((*frames, height + step, width), backbone) and _takes((*frames, height, width + step), backbone):
                return unit
        unit *= 2
    raise ConfigError(f"size = {list(size)}: this model takes no other size near it, so there can be no aspects")


def _takes(size: Size, backbone: Backbone) -> bool:
    try:
        backbone.latent_shape(size)
    except CorefitError:
        return False
    return min(size) > 0


def _rounded(length: float, unit: int) -> int:
    return max(unit, round(length / unit) * unit)
