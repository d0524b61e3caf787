"""Optimizers whose state is smaller than AdamW's, or whose learning rate or direction is found in another way."""

from __future__ import annotations

from corefit import Offers, Optimizer, hookimpl
from corefit_optimizers.adafactor import Adafactor
from corefit_optimizers.eight_bit import AdamW8bit, PagedAdamW8bit
from corefit_optimizers.muon import Muon
from corefit_optimizers.prodigy import Prodigy


@hookimpl
def corefit_optimizers() -> Offers[Optimizer]:
    return {
        "adamw8bit": AdamW8bit,
        "paged_adamw8bit": PagedAdamW8bit,
        "adafactor": Adafactor,
        "prodigy": Prodigy,
        "muon": Muon,
    }
