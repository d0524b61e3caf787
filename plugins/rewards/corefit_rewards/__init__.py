"""Rewards that score media with published models, rules, or a service."""

from __future__ import annotations

from corefit import Offers, hookimpl
from corefit.types import Reward
from corefit_rewards.aesthetic import Aesthetic
from corefit_rewards.clip_score import ClipScore
from corefit_rewards.geneval import Geneval
from corefit_rewards.hps import Hps
from corefit_rewards.image_reward import ImageReward
from corefit_rewards.jpeg_size import JpegSize
from corefit_rewards.ocr import Ocr
from corefit_rewards.pickscore import PickScore
from corefit_rewards.remote import Remote
from corefit_rewards.sharpness import Sharpness
from corefit_rewards.vlm_judge import VlmJudge


@hookimpl
def corefit_rewards() -> Offers[Reward]:
    return {
        "aesthetic": Aesthetic,
        "clip_score": ClipScore,
        "geneval": Geneval,
        "hps": Hps,
        "image_reward": ImageReward,
        "jpeg_size": JpegSize,
        "ocr": Ocr,
        "pickscore": PickScore,
        "remote": Remote,
        "sharpness": Sharpness,
        "vlm_judge": VlmJudge,
    }
