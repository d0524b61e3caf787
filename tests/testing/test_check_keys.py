"""A key that nothing reads is named, whatever offers it; one that is read in any way is not."""

from __future__ import annotations

from functools import cached_property, partial

import attrs
import pytest
import torch
from attrs import define, evolve, field, frozen

from corefit import NoiseWeighting, Objective, Reward, Sampler, Source, Supervised, Term
from corefit.data.sources import Jsonl
from corefit.rollout.noise import LogitNormal
from corefit.rollout.samplers import FlowSde, Ode
from corefit.testing import (
    ToyBackbone,
    ToyReward,
    check_backbone,
    check_noise,
    check_objective,
    check_reward,
    check_sampler,
    check_source,
)
from corefit.testing.keys import check_keys
from corefit.testing.toy import loaded
from corefit_sft import Sft


@frozen
class UnreadObjective(Sft):
    """A second key beside one that is read."""

    anchor: float = 0.5


@frozen
class UnreadSampler(Ode):
    eta: float = 0.5


@frozen
class UnreadNoise(LogitNormal):
    power: float = 2.0


@frozen
class UnreadReward(ToyReward):
    gain: float = 1.0
    offset: float = 0.0

    def score(self, media, prompts, meta):
        return super().score(media, prompts, meta) * self.gain


@frozen
class UnreadSource(Jsonl):
    limit: int = 10


@define(eq=False, slots=False)
class UnreadBackbone(ToyBackbone):
    quantize: bool = False


def unread_backbone():
    check_backbone(loaded(UnreadBackbone()), prompts=["a", "b"])


@pytest.mark.parametrize(
    ("check", "problem"),
    [
        (lambda _: check_objective(UnreadObjective()), r"UnreadObjective: nothing reads 'anchor'.*self\.anchor"),
        (lambda _: check_sampler(UnreadSampler()), "UnreadSampler: nothing reads 'eta'"),
        (lambda _: check_noise(UnreadNoise()), "UnreadNoise: nothing reads 'power'"),
        (lambda _: check_reward(UnreadReward()), "UnreadReward: nothing reads 'offset'"),
        (lambda folder: check_source(UnreadSource(folder / "train.jsonl")), "UnreadSource: nothing reads 'limit'"),
        (lambda _: unread_backbone(), "UnreadBackbone: nothing reads 'quantize'"),
    ],
    ids=["objective", "sampler", "noise", "reward", "source", "backbone"],
)
def test_every_check_names_a_key_that_nothing_reads(check, problem, pictures):
    with pytest.raises(AssertionError, match=f"^{problem}"):
        check(pictures)


# ways to leave a key unread


@frozen
class OnlySet:
    """Written into a copy, and never looked at."""

    decay: float = 0.9

    def slower(self):
        return evolve(self, decay=0.99)


@frozen
class ReadOfAnother:
    """A name that something else has too."""

    shape: int = 3

    def score(self, media, prompts, meta):
        return torch.zeros(media.shape[0])


@frozen
class ReadOfAnArgument:
    """Reads the argument of a function that has no object."""

    gain: float = 1.0

    @staticmethod
    def of(other):
        return other.gain


@frozen
class OnlyValidated:
    """A validator's own lambda looks at its value, not at the key."""

    share: float = field(default=0.5, validator=lambda self, attribute, value: None)


@pytest.mark.parametrize("cls", [OnlySet, ReadOfAnother, ReadOfAnArgument, OnlyValidated])
def test_what_is_no_reading(cls):
    with pytest.raises(AssertionError, match="nothing reads"):
        check_keys(cls, Reward)


@frozen
class Several(OnlySet):
    power: float = 2.0


def test_all_of_several_are_named():
    with pytest.raises(AssertionError, match=r"^nothing reads 'decay', 'power': a pipeline that sets them"):
        check_keys(Several, Reward)


# ways to read one


@frozen
class UnderAnother:
    """`strength` matters only where `soft` is set."""

    soft: bool = False
    strength: float = 1.0

    def score(self, media, prompts, meta):
        return media.flatten(1).mean(1) * (self.strength if self.soft else 1)


@frozen
class ThroughProperties:
    points: int = 1

    @property
    def num_terms(self):
        return 1 + self.points


@define
class ThroughACache:
    """Slots, and a property that attrs keeps in one."""

    gain: float = 1.0

    @cached_property
    def twice(self):
        return 2 * self.gain


@frozen
class InMaking:
    low: float = 0.0
    high: float = field(default=attrs.Factory(lambda this: this.low + 1, takes_self=True))

    def __attrs_post_init__(self):
        if self.high < 0:
            raise ValueError("'high' is below 0")


@frozen
class ByName:
    tint: float = 1.0

    def score(self, media, prompts, meta):
        return getattr(self, "tint") * media.flatten(1).mean(1)  # noqa: B009


@frozen
class AllOfThem:
    brightness: float = 1.0

    def score(self, media, prompts, meta):
        return attrs.asdict(self)["brightness"] * media.flatten(1).mean(1)


def scaled(reward, media):
    """Reads a key of what it is given."""
    factor = reward.gain
    return factor * media.flatten(1).mean(1)


class Mixin:
    """No attrs class."""

    def scale(self):
        return self.gain


@frozen
class ThroughAMixin(Mixin):
    gain: float = 1.0


@frozen
class HandedOn:
    gain: float = 1.0

    def score(self, media, prompts, meta):
        return scaled(self, media)


@frozen
class HandedToAnotherPackage:
    """What that does with it cannot be seen."""

    sharpness: float = 1.0

    def scorer(self):
        return partial(scaled, self)


@frozen
class ByAnyName:
    contrast: float = 1.0

    def value(self, name):
        return getattr(self, name)


@frozen
class Declared(Objective):
    """A name of the protocol: the trainer reads it."""

    num_terms: int = 1
    num_updates: int = 1


@pytest.mark.parametrize(
    "cls",
    [
        UnderAnother,
        ThroughProperties,
        ThroughACache,
        InMaking,
        ThroughAMixin,
        ByName,
        AllOfThem,
        HandedOn,
        HandedToAnotherPackage,
        ByAnyName,
        Declared,
    ],
)
def test_what_is_reading(cls):
    check_keys(cls, Objective)


def test_a_class_without_source_is_not_judged():
    check_keys(attrs.make_class("Made", {"gain": field(default=1.0)}), Reward)


def test_a_class_without_keys_is_not_judged():
    class Plain(Supervised):
        def terms(self, batch, ctx):
            yield Term.of(ctx.rand(len(batch)))

    for cls, protocol in ((Plain, Objective), (Ode, Sampler), (object, NoiseWeighting), (FlowSde, Source)):
        check_keys(cls, protocol)
