"""Between two logs the host never waits for the device: a whole step of each objective is watched for reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from attrs import field, frozen

from corefit import Reward
from corefit.rollout.samplers import FlowSde
from corefit.system import ranks
from corefit.testing.syncs import watched
from corefit.train import loop as train
from corefit.train.meters import NonFiniteGuard
from corefit.types import Weighted
from corefit.types.objective import Sum
from corefit_awm import Awm
from corefit_dpo import OnlineDpo
from corefit_flow_grpo import FlowGrpo
from corefit_nft import Nft
from corefit_reward_gradient import RewardGradient
from corefit_sft import Sft
from corefit_soar import Soar


@frozen
class Red(Reward):
    """How red a picture is."""

    differentiable = True
    asked: list[int] = field(factory=list[int], eq=False, init=False)

    def score(self, media, prompts, meta):
        self.asked.append(len(media))
        return media[:, 0].flatten(1).mean(1)


RL: Mapping[str, Any] = {"group": 2, "steps": 3, "guidance": 2.0}
SDE: Mapping[str, Any] = {"sampler": FlowSde(), "reward": (Weighted("red", Red()),)}
SCORES = "cpu() at rewards.py"
"""The one wait that there may be: scores are numbers on the host, once for each slice of rollouts."""


@pytest.mark.parametrize(
    ("objective", "keys", "waits"),
    [
        (Sft(dropout=0.5), {}, 0),
        (Soar(points=2, paths=2, noise="fresh", dropout=0.5), {"sampler": FlowSde()}, 0),
        (Sum(of=(Weighted("soar", Soar(points=2)), Weighted("sft", Sft(), 0.5))), {}, 0),
        (RewardGradient(method="draft", steps=3, guidance=2.0), {"reward": SDE["reward"]}, 0),
        (FlowGrpo(**RL, beta=0.1, window=1, start="shared", updates=2), SDE, 1),
        (Nft(**RL), SDE, 1),
        (Awm(**RL, train_timesteps=2, off_policy=True), SDE, 1),
        (OnlineDpo(**RL, draws=2), SDE, 1),
    ],
    ids=["sft", "soar", "sum", "reward_gradient", "flow_grpo", "nft", "awm", "online_dpo"],
)
def test_a_step_waits_for_scores_alone(job, monkeypatch, objective, keys, waits):
    """Not for losses, counts, gradients, the optimizer or averages; nor once memory ran out and pieces are smaller."""
    monkeypatch.setattr(NonFiniteGuard, "refuse", lambda *_: None)  # called in logged steps, and on a CPU in all
    loop = train.Loop.build(job(objective, steps=3, batch=4, ema=0.9, log_every=100, **keys), ranks.join("fp32"))
    batches = loop.batches()
    loop.take_step(next(batches))
    loop.state.sizes.lower()
    given, state = next(batches), loop.state
    averages = state.ema.average.values() if state.ema else ()
    held = [given, [*state.trainable.values(), *averages, *state.optimizer.tensors().values()], state.guard.found]
    with watched([*held, [*state.means.sums.values()]]) as reads:
        loop.take_step(given)
        loop.report_step()
    assert state.step == 2
    assert {found.rpartition(":")[0] for found in reads.found} == ({SCORES} if waits else set())


def test_a_read_in_the_step_is_found(job, monkeypatch):
    """Of the gradient's norm, as clip_grad_norm_ with error_if_nonfinite would."""
    loop = train.Loop.build(job(), ranks.join("fp32"))
    real = loop.gradients.norm
    monkeypatch.setattr(type(loop.gradients), "norm", lambda self: torch.tensor(real().item()))
    batch = next(loop.batches())
    with watched([[*loop.state.trainable.values()]]) as reads:
        loop.take_step(batch)
    assert any(found.startswith("item() at test_syncs.py") for found in reads.found)
