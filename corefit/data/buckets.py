"""Aspect-ratio buckets: sizes of about the same area, each in steps that the model accepts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from attrs import frozen

from corefit.errors import ConfigError, CorefitError

if TYPE_CHECKING:
    from corefit.types import Backbone

LARGEST_STEP = 256
ASPECT_SIDE = re.compile(r"\d{1,5}")
"""Matches one side of an aspect ratio."""
Size = tuple[int, ...]


@frozen
class Aspect:
    """An aspect ratio, width to height, such as "16:9"."""

    width: int
    height: int

    @staticmethod
    def parse(text: str) -> Aspect:
        """Return the aspect ratio that `text` names; ValueError unless it is two positive whole numbers and a colon."""
        parts = text.split(":")
        if len(parts) != 2 or not all(ASPECT_SIDE.fullmatch(part.strip()) and int(part) for part in parts):
            raise ValueError(f"{text!r} is not an aspect ratio; write width:height, such as '4:3'")
        return Aspect(int(parts[0]), int(parts[1]))

    @property
    def ratio(self) -> float:
        return self.width / self.height


def sizes(size: Size, aspects: Sequence[str], backbone: Backbone) -> tuple[Size, ...]:
    """Return the size of each bucket: `size` alone, or for each aspect ratio a size of the same area and frames.

    Height and width are rounded to steps that `latent_shape` accepts. ConfigError if it accepts none near them.
    """
    if not aspects:
        return (size,)
    *frames, height, width = size
    unit = _size_step(size, backbone)
    found: dict[Size, str] = {}
    for text in aspects:
        ratio = Aspect.parse(text).ratio
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
    """Return the index of the bucket whose aspect ratio is nearest, on a log scale, to that of `height` and `width`."""
    wanted = math.log(width / height)
    return min(range(len(sizes)), key=lambda n: abs(math.log(sizes[n][-1] / sizes[n][-2]) - wanted))


def _size_step(size: Size, backbone: Backbone) -> int:
    """Return the smallest step in pixels, a power of two, by which the model lets height and width grow or shrink."""
    backbone.latent_shape(size)
    *frames, height, width = size
    unit = 1
    while unit <= LARGEST_STEP:
        for step in (unit, -unit):
            if _accepts((*frames, height + step, width), backbone) and _accepts(
                (*frames, height, width + step), backbone
            ):
                return unit
        unit *= 2
    raise ConfigError(f"size = {list(size)}: this model accepts no other size near it; remove aspects")


def _accepts(size: Size, backbone: Backbone) -> bool:
    try:
        backbone.latent_shape(size)
    except CorefitError:
        return False
    return min(size) > 0


def _rounded(length: float, unit: int) -> int:
    return max(unit, round(length / unit) * unit)
