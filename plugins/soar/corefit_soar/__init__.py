"""SOAR (arXiv 2604.12617): supervise the model back from its own off-trajectory states; no reward needed."""

from __future__ import annotations

from typing import Any

from corefit import Objective, Offers, hookimpl
from corefit_soar.objective import Soar


@hookimpl
def corefit_objectives() -> Offers[Objective[Any]]:
    return {"soar": Soar}
