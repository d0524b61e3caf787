"""Flow-GRPO (arXiv 2505.05470): policy gradients for flow models from groups of stochastic rollouts."""

from __future__ import annotations

from typing import Any

from corefit import Objective, Offers, hookimpl
from corefit_flow_grpo.objective import FlowGrpo


@hookimpl
def corefit_objectives() -> Offers[Objective[Any]]:
    return {"flow_grpo": FlowGrpo}
