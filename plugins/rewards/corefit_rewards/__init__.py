"""Rewards that score media with published models, rules, or a service."""

from __future__ import annotations

from corefit import Offers, hookimpl
from corefit.types import Reward
from corefit_rewards.aesthetic import Aesthetic
from corefit_rewards.clip_score import ClipScore
from corefit_rewards.hps import Hps
from corefit_rewards.image_reward import ImageReward
from corefit_rewards.pickscore import PickScore


@hookimpl
def corefit_rewards() -> Offers[Reward]:
    return {
        "aesthetic": Aesthetic,
        "clip_score": ClipScore,
        "hps": Hps,
        "image_reward": ImageReward,
        "pickscore": PickScore,
    }
