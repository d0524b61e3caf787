"""The classes of diffusers, whose first import takes seconds."""

from __future__ import annotations

import atexit
import gc
import sys
from typing import Any


def diffusers_class(name: str) -> Any:
    """A class of diffusers. What the first import makes is not searched for garbage, neither then nor later.

    That would be a fifth of the time to the first step: there are half a million objects, and nearly all of them stay.
    """
    first = "diffusers" not in sys.modules and gc.isenabled()
    if first:
        gc.collect()
        gc.disable()
    try:
        import diffusers

        return getattr(diffusers, name)
    finally:
        if first:
            gc.freeze()
            gc.enable()
            atexit.register(gc.unfreeze)  # or nanobind, in triton, says at the end that all of this leaks
