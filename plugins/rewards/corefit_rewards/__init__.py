"""Rewards that score media with published models, rules, or a service."""

from __future__ import annotations

from corefit import Offers, hookimpl
from corefit.types import Reward
from corefit_rewards.clip_score import ClipScore
from corefit_rewards.pickscore import PickScore


@hookimpl
def corefit_rewards() -> Offers[Reward]:
    return {
        "clip_score": ClipScore,
        "pickscore": PickScore,
    }
