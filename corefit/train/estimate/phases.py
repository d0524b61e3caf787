"""What one process needs of memory, phase by phase."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from attrs import field, frozen

ACTIVATIONS = "activations"
"""The part of a phase that a forward takes, and a backward; it is an estimate, all others are counted."""
MISSED = 2.0
"""Activations of so many times the memory of a device do not fit, however wrong their estimate is."""
ENCODING_TEXTS, ENCODING_MEDIA = "encoding texts", "encoding media"
READING, SAMPLING, DECODING = "reading weights", "sampling", "decoding and scoring"
TRAINING, SAVING = "training", "saving"
EVAL_SAMPLING, EVAL_DECODING = "sampling for [eval]", "decoding for [eval]"
ORDER = (
    *(ENCODING_TEXTS, ENCODING_MEDIA, READING, SAMPLING, DECODING, TRAINING, SAVING),
    *(EVAL_SAMPLING, EVAL_DECODING),
)
"""The names of phases, in the order of a run."""


@frozen
class Phase:
    """The most that one process holds in a phase of a run, in bytes of its device.

    name   what is done, such as "training"
    parts  what is held -> bytes
    known  whether what a forward takes is among them; False where the network or a reward cannot say
    """

    name: str
    parts: Mapping[str, float]
    known: bool = True

    @property
    def total(self) -> float:
        """All bytes."""
        return sum(self.parts.values())

    @property
    def certain(self) -> float:
        """Bytes that are held whatever a forward takes."""
        return sum(count for name, count in self.parts.items() if name != ACTIVATIONS)


def _phases(given: Iterable[Any]) -> tuple[Phase, ...]:
    """Return phases, of which some may be mappings, as JSON has them."""
    return tuple(each if isinstance(each, Phase) else Phase(**each) for each in given)


@frozen(kw_only=True)
class Estimate:
    """The memory that one stage takes on one process.

    parameters, trainable          how many numbers the network has, and how many of them train
    weights, gradients, optimizer  bytes
    exchanged                      bytes of DDP's buckets, a second copy of the gradients for the exchange
    copies                         bytes of the average (ema), of the reference policy and of moving copies
    gathered                       bytes of the largest weight, which is gathered from its shards to be saved
    decoder                        bytes of the decoder of latents, for a stage that decodes
    rewards                        bytes of the networks of rewards, as far as they say (corefit.types.SizedReward)
    activations                    bytes that a step holds at most besides these; None where that is not known
    beyond                         whether there are more than these: a reward's gradient, which takes long to count for
                                   a clip, is counted only up to MISSED times the memory of the device
    kept                           bytes of the batch's rows, and of what an objective keeps of their rollouts
    unsharded                      bytes of weights that are gathered from their shards within a step
    phases                         what is held in each phase of the stage; none where only these numbers were asked for
    host                           bytes of main memory that all processes of a machine take; 0 where the device is that
    """

    stage: str
    parameters: int
    trainable: int
    weights: float
    gradients: float
    optimizer: float
    exchanged: float
    copies: float
    gathered: float
    activations: int | None
    beyond: bool = False
    decoder: float = 0.0
    rewards: float = 0.0
    kept: float = 0.0
    unsharded: float = 0.0
    phases: tuple[Phase, ...] = field(default=(), converter=_phases)
    host: float = 0.0

    @property
    def read(self) -> float:
        """Bytes while the weights are read: no more than the weights themselves, and what stays from before."""
        return self.weights + self.rewards

    @property
    def saved(self) -> float:
        """Bytes while the last checkpoint and the model are saved; gradients are gone by then."""
        return self.weights + self.optimizer + self.copies + self.gathered + self.decoder + self.rewards

    @property
    def certain(self) -> float:
        """Bytes that are taken from the first step to the last, whatever the batch."""
        trained = self.weights + self.gradients + self.optimizer + self.exchanged + self.copies
        return trained + self.decoder + self.rewards

    @property
    def total(self) -> float:
        """Bytes at most during training, with activations where they are known."""
        return self.certain + self.unsharded + self.kept + (self.activations or 0)

    @property
    def peak(self) -> float:
        """Bytes at most in any phase."""
        return max(self.total, self.saved, self.read, *(phase.total for phase in self.phases))

    @property
    def known(self) -> bool:
        """Whether what forwards take is known in every phase."""
        return self.activations is not None and all(phase.known for phase in self.phases)
