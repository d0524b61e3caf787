"""How much memory a pipeline takes, phase by phase, and what would take less of it."""

from corefit.train.estimate.device import Device
from corefit.train.estimate.phases import Estimate, Phase
from corefit.train.estimate.search import ROOM, Fit, Search
from corefit.train.estimate.show import refuse, show, show_fit
from corefit.train.estimate.stages import estimates

__all__ = ["ROOM", "Device", "Estimate", "Fit", "Phase", "Search", "estimates", "refuse", "show", "show_fit"]
