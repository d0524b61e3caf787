"""What plugins and the trainer say to each other: values, the protocols of plugins, objectives, a stage's settings."""

from corefit.types.protocols import (
    Backbone,
    Configured,
    NoiseWeighting,
    Reward,
    Sampler,
    Sized,
    Source,
    StoredTensors,
    Streamed,
)
from corefit.types.stage import Samples, TrainState
from corefit.types.values import ROUNDING, Batch, Condition, Example, Meta, ModelPath, Step, Stored, Term, Weighted

__all__ = [
    "ROUNDING",
    "Backbone",
    "Batch",
    "Condition",
    "Configured",
    "Example",
    "Meta",
    "ModelPath",
    "NoiseWeighting",
    "Reward",
    "Sampler",
    "Samples",
    "Sized",
    "Source",
    "Step",
    "Stored",
    "StoredTensors",
    "Streamed",
    "Term",
    "TrainState",
    "Weighted",
]
