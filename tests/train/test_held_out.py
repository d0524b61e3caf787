"""Every objective that scores samples: threads change no bit, and held-out rewards change no weight."""

from __future__ import annotations

import threading
from typing import ClassVar

import attrs
import pytest
import torch
from attrs import frozen
from training import Heard, trained

from corefit import Reward
from corefit.rng import Rng
from corefit.rollout import record, sample
from corefit.rollout.noise import LogitNormal
from corefit.samplers import Cps
from corefit.system import ranks
from corefit.train import loop as train
from corefit.types import Weighted
from corefit.types.objective import Context
from corefit_awm import Awm
from corefit_dpo import OnlineDpo
from corefit_flow_grpo import FlowGrpo
from corefit_nft import Nft
from corefit_reward_gradient import RewardGradient

KEYS = {"group": 2, "steps": 3, "guidance": 2.0}
OBJECTIVES = {
    "flow_grpo": (FlowGrpo(**KEYS), {"sampler": Cps()}),
    "each": (FlowGrpo(**KEYS, std="each"), {"sampler": Cps()}),
    "nft": (Nft(**KEYS), {}),
    "awm": (Awm(**KEYS, train_timesteps=1), {}),
    "online_dpo": (OnlineDpo(**KEYS, draws=1), {}),
    "reward_gradient": (RewardGradient(method="refl", steps=3, guidance=1.0), {}),
}


@frozen
class Channel(Reward):
    """The mean of one channel, and where it was asked for."""

    index: int = 0
    names: set[str] = attrs.field(factory=set, eq=False, init=False)

    differentiable: ClassVar[bool] = True

    def score(self, media, prompts, meta):
        self.names.add(threading.current_thread().name.partition("_")[0])
        return media[:, self.index].flatten(1).mean(1)


class Threaded(Channel):
    """The same in a thread."""

    concurrent: ClassVar[bool] = True


def run(job, name, kind, held=()):
    """Weights, what was logged, and the threads that the rewards were called in."""
    objective, keys = OBJECTIVES[name]
    rewards = (Weighted("red", kind(0)), Weighted("green", kind(1), -0.5))
    held = tuple(Weighted(f"held{number}", each(2)) for number, each in enumerate(held))
    lines = []
    mine = job(objective, steps=2, batch=8, micro_batch=2, log_every=1, reward=rewards, held_out=held, **keys)
    left = trained(attrs.evolve(mine, listener=Heard(on_logged=lambda step, metrics: lines.append(dict(metrics)))))
    for line in lines:
        for clock in ("samples_per_second", "seconds"):
            line.pop(clock)
    return left, lines, set().union(*(each.value.names for each in (*rewards, *held)))


@pytest.mark.parametrize(("every", "said"), [(10, 1), (1, 0)])
def test_a_stage_too_short_for_an_alarm_says_so_once(job, capsys, every, said):
    objective, keys = OBJECTIVES["flow_grpo"]
    keys = {**keys, "reward": (Weighted("red", Channel(0)),), "held_out": (Weighted("blue", Channel(2)),)}
    train.Loop.resume(job(objective, steps=40, log_every=every, **keys), ranks.join("fp32"))
    told = "stage s: no alarm can sound: it looks at 30 logged steps, and the stage logs 4; lower log_every or"
    assert capsys.readouterr().out.count(told) == said


@pytest.mark.parametrize("name", OBJECTIVES)
def test_threads_change_no_bit_and_held_out_rewards_no_weight(job, name):
    plain, lines, threads = run(job, name, Channel)
    other, held_lines, held_threads = run(job, name, Threaded, held=(Channel, Threaded))
    assert all(torch.equal(plain[key], other[key]) for key in plain)
    held = {"held_out/held0", "held_out/held1"}
    assert [{k: v for k, v in line.items() if k not in held} for line in held_lines] == lines
    assert all(line["held_out/held0"] == line["held_out/held1"] for line in held_lines)
    assert {"reward", "reward/red", "reward/green"} <= lines[0].keys()
    assert threads == {"MainThread"}
    with_graph = name == "reward_gradient"
    assert held_threads == {"MainThread", *(() if with_graph else ("reward red", "reward green", "reward held1"))}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reward ")]


def test_scoring_while_sampling_gives_the_scores_of_the_samples(job):
    mine = job()
    loop = train.Loop.build(mine, ranks.join("fp32"))
    given = mine.dataset.batch([*range(8)], [*range(8)])
    entries = [Weighted("red", Threaded(0))]
    ctx = Context(mine.backbone, Cps(), LogitNormal(), Rng(("test",), range(8)), entries, micro_batch=3)
    assert loop.state.step == 0
    with ctx.scoring(given) as scoring:
        x0 = sample(given, ctx, steps=3, guidance=2.0, scoring=scoring)
        scores = scoring.result()
    with torch.no_grad():
        assert torch.equal(scores.total, ctx.score(x0, given).total)
    with ctx.scoring(given) as scoring:
        taken = record(given, ctx, steps=3, length=2, guidance=2.0, scoring=scoring)
        recorded = scoring.result()
    with torch.no_grad():
        assert torch.equal(recorded.total, ctx.score(taken.x0, given).total)
    assert scores.total.std() > 0
