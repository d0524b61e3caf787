"""Rewards that score media with published models, rules, or a service."""

from __future__ import annotations

from corefit import Offers, hookimpl
from corefit.types import Reward


@hookimpl
def corefit_rewards() -> Offers[Reward]:
    return {}
