"""The types that plugins and the trainer share: values, protocols of plugins, objectives, a stage's settings."""

from corefit.types.observer import Observer, PipelineView, Scored
from corefit.types.protocols import (
    Backbone,
    Configured,
    Featured,
    KeyedReward,
    NoiseWeighting,
    Reward,
    Sampler,
    Sized,
    SizedDecoder,
    SizedReward,
    SizedScore,
    Source,
    StoredTensors,
    Streamed,
)
from corefit.types.stage import Samples, TrainState
from corefit.types.values import (
    ROUNDING,
    ArchiveMember,
    Batch,
    Condition,
    Example,
    Meta,
    ModelPath,
    Moving,
    Scores,
    Step,
    Term,
    Weighted,
    key_of,
)

__all__ = [
    "ROUNDING",
    "ArchiveMember",
    "Backbone",
    "Batch",
    "Condition",
    "Configured",
    "Example",
    "Featured",
    "KeyedReward",
    "Meta",
    "ModelPath",
    "Moving",
    "NoiseWeighting",
    "Observer",
    "PipelineView",
    "Reward",
    "Sampler",
    "Samples",
    "Scored",
    "Scores",
    "Sized",
    "SizedDecoder",
    "SizedReward",
    "SizedScore",
    "Source",
    "Step",
    "StoredTensors",
    "Streamed",
    "Term",
    "TrainState",
    "Weighted",
    "key_of",
]

Stored = ArchiveMember
"""`ArchiveMember`, under the name that it had in version 0.1."""
