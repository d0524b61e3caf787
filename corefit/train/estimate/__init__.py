"""How much memory a pipeline takes, phase by phase, and what would take less of it."""

from corefit.train.estimate.device import Device
from corefit.train.estimate.phases import Estimate, Phase
from corefit.train.estimate.show import refuse, show
from corefit.train.estimate.stages import estimates

__all__ = ["Device", "Estimate", "Phase", "estimates", "refuse", "show"]
