"""The alarm: when it sounds, what it keeps, and what a stage does that ends by it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator

import attrs
import pytest
import torch
from attrs import frozen
from training import Heard, trained, worst

from corefit import Batch, Context, Reward, Supervised, Term
from corefit.errors import PluginError, Stopped
from corefit.flow import interpolate, per_sample
from corefit.samplers import Cps
from corefit.train.alarm import Watch, trend
from corefit.types import Weighted
from corefit.types.objective import Sum
from corefit.types.stage import Alarm, Stage
from corefit_flow_grpo import FlowGrpo
from corefit_sft import Sft

HELD = "held_out/strict"


def alarms(trained, held, watch=None, start=1):
    """The steps in which the alarm sounds, with what it says."""
    watch = watch or Watch(Alarm(window=20))
    pairs = enumerate(zip(trained, held, strict=True), start)
    said = ((step, watch.see(step, {"reward": a, HELD: b})) for step, (a, b) in pairs)
    return {step: text for step, text in said if text}


def noisy(slope, seed, count=60):
    draw = random.Random(seed)
    return [slope * i + draw.gauss(0, 1) for i in range(count)]


def test_the_trend_is_mann_and_kendalls():
    assert trend(range(12)) == pytest.approx((66 - 1) / (12 * 11 * 29 / 18) ** 0.5)
    assert trend(range(12, 0, -1)) == -trend(range(12))
    assert trend([1.0] * 12) == 0
    assert trend([1, 2, 2, 3]) == pytest.approx((5 - 1) / (4 * 3 * 13 / 18) ** 0.5)
    assert trend([0, 1, 0]) == 0
    values = noisy(0.1, 0)
    assert trend([10**v for v in values]) == trend(values)


def test_it_sounds_where_the_reward_rises_and_a_held_out_one_falls():
    said = alarms(noisy(0.5, 1), noisy(-0.5, 2))
    first = min(said)
    assert 20 <= first < 30
    assert said[first].startswith("held_out/strict fell from ")
    assert f"in the 20 logged steps from {first - 19} to {first}, while reward rose from" in said[first]


def test_a_window_that_has_sounded_does_not_sound_again():
    rising = list(range(60))
    assert [*alarms(rising, [-v for v in rising])] == [20, 40, 60]


@pytest.mark.parametrize(
    ("reward", "held"),
    [(0.5, 0.5), (0.5, 0.0), (-0.5, -0.5), (0.0, 0.0)],
    ids=["both rise", "one rises", "both fall", "neither"],
)
def test_it_is_silent_elsewhere(reward, held):
    for seed in range(10):
        assert alarms(noisy(reward, seed), noisy(held, seed + 100)) == {}


def test_a_reward_that_stays_as_it_is_does_not_rise():
    assert alarms([0.5] * 60, noisy(-0.5, 0)) == {}


def test_false_alarms_are_rare():
    """The worst case: the reward rises for certain, and the held-out one has no trend. Expected are 0.08 % of runs."""
    found = sum(bool(alarms(range(100), noisy(0, seed, 100))) for seed in range(100))
    assert found <= 1


def test_a_window_needs_a_threshold_that_it_can_reach():
    with pytest.raises(ValueError, match=r"'threshold' must be below 3\.94, the largest z of 10 logged steps"):
        Alarm(window=10)
    rising = list(range(10))
    assert [*alarms(rising, [-v for v in rising], Watch(Alarm(window=10, threshold=3.9)))] == [10]


def test_it_goes_on_from_a_checkpoint_at_any_step():
    rising, falling = noisy(0.3, 3), noisy(-0.3, 4)
    whole = alarms(rising, falling)
    assert whole
    for cut in range(0, 60, 7):
        before, after = Watch(Alarm(window=20)), Watch(Alarm(window=20))
        early = alarms(rising[:cut], falling[:cut], before)
        after.restore(json.loads(json.dumps(before.state())))
        assert early | alarms(rising[cut:], falling[cut:], after, cut + 1) == whole


def test_each_objective_of_a_sum_is_watched_by_itself():
    watch, said = Watch(Alarm(window=20)), ""
    for step in range(20):
        said = watch.see(step, {"a/reward": step, f"a/{HELD}": -step, "b/reward": -step, f"b/{HELD}": -step})
    assert "a/held_out/strict fell" in said
    assert "b/held_out" not in said


def test_an_objective_that_logs_no_reward_is_told():
    with pytest.raises(PluginError, match=r"held_out/strict is logged and reward is not.*scores.metrics"):
        Watch(Alarm(window=20)).see(1, {HELD: 1.0})


def test_held_out_numbers_that_are_not_finite_are_refused():
    with pytest.raises(PluginError, match="held_out/strict is not finite"):
        Watch(Alarm(window=20)).see(1, {HELD: float("nan"), "reward": 1.0})


# in a stage


@frozen
class Dark(Reward):
    """A reward that is not asked: the objective below reports in its place."""

    def score(self, media, prompts, meta):
        raise AssertionError


@frozen
class Exploited(Supervised):
    """SFT that logs a reward that rises with the steps, and a held-out one that falls."""

    wrong: float = 0.0
    """Added to the held-out score in step 2."""

    def experience(self, batch: Batch, ctx: Context) -> Iterator[Batch]:
        n = len(batch)
        ctx.report(HELD, torch.full((n,), -float(ctx.step)) + (self.wrong if ctx.step == 2 else 0))
        yield Told(**{f.name: getattr(batch, f.name) for f in attrs.fields(Batch)}, told=torch.full((n,), ctx.step))

    def terms(self, batch: Batch, ctx: Context) -> Iterator[Term]:
        x0 = batch.clean
        noise, sigma = ctx.randn_like(x0), ctx.sigma(x0)
        yield Term.of(
            per_sample((ctx.backbone.velocity(interpolate(x0, noise, sigma), sigma, batch.cond) - noise) ** 2)
        )


@frozen(eq=False, kw_only=True)
class Told(Batch):
    """A batch that logs a reward."""

    told: torch.Tensor

    @property
    def metrics(self):
        return {"reward": self.told}


def watched(job, objective=None, stop=False, **keys):
    """A stage of 14 steps, each logged, whose alarm sounds in the tenth, and what it was heard to say."""
    said = {"logged": [], "alarmed": [], "ended": []}
    listener = Heard(
        on_logged=lambda step, metrics: said["logged"].append((step, dict(metrics))),
        on_alarmed=said["alarmed"].append,
        on_ended=lambda *args: said["ended"].append(args),
    )
    alarm = Alarm(window=10, threshold=3.5, stop=stop)
    keys = {"steps": 14, "log_every": 1, "held_out": (Weighted("strict", Dark()),), "alarm": alarm, **keys}
    return attrs.evolve(job(objective or Exploited(), **keys), listener=listener), said


def test_an_alarm_is_logged_and_told_and_training_goes_on(job):
    mine, said = watched(job)
    left = trained(mine)
    assert [step for step, metrics in said["logged"] if "alarm" in metrics] == [10]
    assert said["logged"][9][1]["alarm"] == 1.0
    assert len(said["alarmed"]) == 1
    assert "from 1 to 10" in said["alarmed"][0]
    assert said["ended"] == []
    assert len(said["logged"]) == 14
    assert worst(left, trained(job(Exploited(), steps=14, log_every=1))) == 0


def test_an_alarm_ends_the_stage_as_if_it_had_so_many_steps(job):
    mine, said = watched(job, stop=True, checkpoint_every=100)
    left = trained(mine)
    assert said["ended"] == [(10, said["alarmed"][0])]
    assert len(said["logged"]) == 10
    assert worst(left, trained(job(Exploited(), steps=10, log_every=1))) == 0
    assert [path.name for path in (mine.folder / "checkpoints").iterdir()] == ["step-000010"]
    again = trained(mine)  # a process that was killed while it saved the model
    assert worst(left, again) == 0
    assert len(said["logged"]) == 10
    assert said["ended"] == [(10, said["alarmed"][0])] * 2


@pytest.mark.parametrize("stop", [True, False])
def test_a_stage_that_was_stopped_sounds_in_the_same_step(job, stop):
    expected, whole = watched(job, stop=stop)
    left = trained(expected)
    for last in (6, 9, 10):
        mine, said = watched(job, stop=stop)
        stops = iter([*[False] * (last - 1), True])
        with pytest.raises(Stopped):
            trained(attrs.evolve(mine, listener=attrs.evolve(mine.listener, asked=lambda stops=stops: next(stops))))
        assert worst(left, trained(mine)) == 0
        assert said["alarmed"] == whole["alarmed"]
        assert said["ended"] == whole["ended"]
        steps = [(step, metrics.get("alarm")) for step, metrics in said["logged"]]
        assert steps == [(step, metrics.get("alarm")) for step, metrics in whole["logged"]]


def test_steps_that_are_not_logged_do_not_count(job):
    mine, said = watched(job, log_every=2)
    trained(mine)
    assert len(said["logged"]) == 7
    assert said["alarmed"] == []


@pytest.mark.parametrize("every", [3, 100], ids=["a checkpoint first", "a log first"])
def test_held_out_numbers_that_are_not_finite_are_not_saved(job, every):
    """Where scores have a graph nothing waits for them, so that they are looked at when they are saved or logged."""
    mine, _ = watched(job, Exploited(float("nan")), steps=12, log_every=5, checkpoint_every=every, alarm=None)
    with pytest.raises(PluginError, match="held_out/strict is not finite; raise an error in score"):
        trained(mine)
    assert not (mine.folder / "checkpoints").exists() or not list((mine.folder / "checkpoints").iterdir())


def test_in_a_sum_the_name_of_the_objective_comes_first(job):
    both = Sum(of=(Weighted("exploited", Exploited()), Weighted("sft", Sft())))
    mine, said = watched(job, both)
    trained(mine)
    assert {"exploited/reward", "exploited/held_out/strict"} <= said["logged"][0][1].keys()
    assert said["alarmed"][0].startswith("exploited/held_out/strict fell")


# keys


def problems(**keys):
    keys = {"name": "s", "steps": 100, "objective": FlowGrpo(), "sampler": Cps(), "log_every": 1, **keys}
    return [*Stage(**{"reward": (Weighted("bright", Bright()),), **keys}).problems()]


@frozen
class Bright(Reward):
    gain: float = 1.0

    def score(self, media, prompts, meta):
        raise AssertionError


STRICT = Weighted("bright", Bright(2.0))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"held_out": (STRICT, STRICT)}, "held_out: 'bright' is listed twice"),
        ({"held_out": (Weighted("bright", Bright()),)}, "held_out: 'bright' with these keys is trained on"),
        ({"held_out": (Weighted("strict", Bright(2.0), 2.0),)}, "held_out: 'strict' is not summed with others"),
        (
            {"held_out": (Weighted("strict", Bright(2.0), 1.0, "batch"),)},
            "held_out: 'strict' is not summed with others",
        ),
        ({"alarm": Alarm()}, "alarm: there is no held-out reward to watch"),
        ({"held_out": (STRICT,), "alarm": Alarm(window=101)}, "alarm.window: it needs 101 logged steps.* logs 100;"),
        ({"held_out": (STRICT,), "alarm": Alarm(), "log_every": 4}, "alarm.window: it needs 30 .* logs 25; lower it"),
        (
            {"held_out": (STRICT,), "objective": Sft(), "reward": (), "sampler": None},
            "held_out: this objective makes no samples",
        ),
    ],
)
def test_keys_that_cannot_work_are_refused(keys, said):
    found = problems(**keys)
    assert len(found) == 1
    assert re.match(said, found[0])


def test_keys_that_work():
    assert problems(held_out=(STRICT,)) == []
    assert problems(held_out=(STRICT,), alarm=Alarm(), log_every=3) == []
    assert problems(held_out=(STRICT,), steps=2) == []
