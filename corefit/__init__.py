"""corefit: pluggable post-training objectives for flow-matching image and video models."""

from corefit.plugins.hookspecs import API_VERSION, Offers, hookimpl
from corefit.types import (
    ROUNDING,
    Backbone,
    Batch,
    Condition,
    Example,
    NoiseWeighting,
    Reward,
    Sampler,
    Source,
    Step,
    Term,
)
from corefit.types.objective import Context, Objective, Supervised

__version__ = "0.1.0"
__all__ = [
    "API_VERSION",
    "ROUNDING",
    "Backbone",
    "Batch",
    "Condition",
    "Context",
    "Example",
    "NoiseWeighting",
    "Objective",
    "Offers",
    "Reward",
    "Sampler",
    "Source",
    "Step",
    "Supervised",
    "Term",
    "hookimpl",
]
