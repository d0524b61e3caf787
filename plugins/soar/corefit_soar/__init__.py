"""SOAR (arXiv 2604.12617): the model learns to return from off-trajectory states of its own; no reward is needed."""

from __future__ import annotations

from typing import Any

from corefit import Objective, Offers, hookimpl
from corefit_soar.objective import Soar


@hookimpl
def corefit_objectives() -> Offers[Objective[Any]]:
    return {"soar": Soar}
