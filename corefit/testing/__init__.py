"""What tests of plugins need: a check for each kind, a toy model that runs on any CPU, tiny checkpoints.

A check takes one plugin, made as a pipeline would make it, and raises an AssertionError that names the problem and says
what to change. All of them refuse a key that nothing reads. `pytest --corefit PLUGIN` runs them on all that is offered.
"""

from corefit.testing.backbones import check_backbone
from corefit.testing.checkpoints import tiny_chroma, tiny_flux, tiny_sd3, tiny_wan
from corefit.testing.objectives import check_objective
from corefit.testing.offers import check_noise, check_reward, check_source
from corefit.testing.samplers import check_sampler
from corefit.testing.toy import ToyBackbone, ToyReward, toy_batch, toy_context

__all__ = [
    "ToyBackbone",
    "ToyReward",
    "check_backbone",
    "check_noise",
    "check_objective",
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
