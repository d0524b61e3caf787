"""check_objective on objectives that roll out: rewards, groups and ranks."""

import pytest
import torch
from attrs import frozen

from corefit import Reward
from corefit.samplers import Cps, DanceSde
from corefit.testing import check_objective
from corefit_flow_grpo.advantage import advantages
from corefit_flow_grpo.objective import FlowGrpo

GRPO = {"group": 4, "steps": 4}


@pytest.mark.parametrize(
    "objective",
    [
        FlowGrpo(**GRPO),
        FlowGrpo(**GRPO, epochs=2, updates=2),
        FlowGrpo(**GRPO, beta=0.1, kl="published", std="group", zero_variance="keep"),
        FlowGrpo(group=2, steps=6, window=2, detach_unconditional=True),
    ],
    ids=lambda o: type(o).__name__,
)
def test_flow_grpo_passes(objective):
    check_objective(objective)


@pytest.mark.parametrize("sampler", [Cps(), DanceSde()], ids=repr)
def test_flow_grpo_passes_with_other_samplers(sampler):
    check_objective(FlowGrpo(**GRPO), sampler=sampler)


@frozen
class HalfConstant(Reward):
    """No variance in groups of even number: these rows are left out."""

    def score(self, media, prompts, meta):
        odd = torch.tensor([int(prompt.split()[-1]) % 2 for prompt in prompts])
        return media.flatten(1).mean(1) * odd


@frozen
class OneGroup(Reward):
    """Variance in the first group alone: one of two ranks has no informative row."""

    def score(self, media, prompts, meta):
        return media.flatten(1).mean(1) * torch.tensor([prompt == "prompt 0" for prompt in prompts])


@pytest.mark.parametrize("reward", [HalfConstant(), OneGroup()], ids=repr)
def test_flow_grpo_passes_where_groups_carry_no_information(reward):
    check_objective(FlowGrpo(**GRPO), reward=reward)
    check_objective(FlowGrpo(**GRPO, updates=2), reward=reward)


@frozen
class OwnStatistics(FlowGrpo):
    """Divides by the standard deviation of its own rank's rewards."""

    def _advantages(self, reward, rows, ctx):
        return advantages(reward, self.group, global_std=True)


@frozen
class OwnLength(FlowGrpo):
    """Drops rows without telling the other ranks."""

    @staticmethod
    def _informative(index, informative, ctx):
        return [i for i in index if informative[i]] or index[:1]


@frozen
class Uneven(FlowGrpo):
    """Asks the others on the rank of row 0 alone."""

    def _advantages(self, reward, rows, ctx):
        every = ctx.gather(reward) if rows[0] == 0 else reward
        return advantages(every, self.group, global_std=False)[: len(rows)]


@pytest.mark.parametrize(
    ("cls", "problem"),
    [
        (OwnStatistics, "one batch and 2 ranks of it give other sums"),
        (OwnLength, r"two ranks get parts of \[4\] and \[1\] rows"),
        (Uneven, "ranks gather tensors of shapes|one rank calls ctx.gather more often"),
    ],
)
def test_an_objective_that_ranks_would_disagree_on_is_named(cls, problem):
    with pytest.raises(AssertionError, match=problem):
        check_objective(cls(**GRPO), reward=OneGroup() if cls is OwnLength else None)
