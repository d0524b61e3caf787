"""The test kit for plugins: a check for each kind, a toy model that runs on any CPU, and tiny checkpoints.

A check takes an instance of a plugin's class and raises an AssertionError that names the problem and says what to
change. All checks refuse a key that nothing reads. `pytest --corefit PLUGIN` checks everything that a plugin offers.
"""

from corefit.testing.backbones import check_backbone
from corefit.testing.checkpoints import tiny_chroma, tiny_flux, tiny_sd3, tiny_wan
from corefit.testing.objectives import check_objective
from corefit.testing.observers import check_observer
from corefit.testing.offers import check_noise, check_reward, check_source
from corefit.testing.optimizers import check_optimizer
from corefit.testing.samplers import check_sampler
from corefit.testing.toy import ToyBackbone, ToyReward, toy_batch, toy_context

__all__ = [
    "ToyBackbone",
    "ToyReward",
    "check_backbone",
    "check_noise",
    "check_objective",
    "check_observer",
    "check_optimizer",
    "check_reward",
    "check_sampler",
    "check_source",
    "tiny_chroma",
    "tiny_flux",
    "tiny_sd3",
    "tiny_wan",
    "toy_batch",
    "toy_context",
]
