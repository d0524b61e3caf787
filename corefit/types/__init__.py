"""The types that plugins and the trainer share: values, protocols of plugins, objectives, a stage's settings."""

from corefit.types.protocols import (
    Backbone,
    Configured,
    Featured,
    NoiseWeighting,
    Reward,
    Sampler,
    Sized,
    SizedDecoder,
    SizedReward,
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
    "Meta",
    "ModelPath",
    "Moving",
    "NoiseWeighting",
    "Reward",
    "Sampler",
    "Samples",
    "Scores",
    "Sized",
    "SizedDecoder",
    "SizedReward",
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
