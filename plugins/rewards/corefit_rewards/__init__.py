"""Rewards that score media with published models, rules, or a service."""

from __future__ import annotations

from corefit import Offers, hookimpl
from corefit.types import Reward
from corefit_rewards.jpeg_size import JpegSize
from corefit_rewards.ocr import Ocr
from corefit_rewards.remote import Remote
from corefit_rewards.sharpness import Sharpness


@hookimpl
def corefit_rewards() -> Offers[Reward]:
    return {
        "jpeg_size": JpegSize,
        "ocr": Ocr,
        "remote": Remote,
        "sharpness": Sharpness,
    }
