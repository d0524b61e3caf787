"""Scores while samples are made: concurrent, held-out and normalized rewards, and what happens when one fails."""

from __future__ import annotations

import threading
from typing import ClassVar

import pytest
import torch
from attrs import frozen

from corefit import Reward
from corefit.errors import NonFinite, PluginError, Stopped
from corefit.rng import Rng
from corefit.rollout.noise import LogitNormal
from corefit.samplers import Ode
from corefit.types import Batch, Condition, Weighted
from corefit.types.objective import Context

ROWS, MICRO = 12, 2
PROMPTS = [f"row {i}" for i in range(ROWS)]
WAIT = 10.0


class Doubles:
    """Decodes to twice the latents, and counts how often it is asked."""

    def __init__(self):
        self.calls = 0

    def decode(self, x0, checkpoint=False):
        self.calls += 1
        return 2 * x0


@frozen
class Bright(Reward):
    """The mean of the media, times a gain; and a number that depends on the prompt."""

    differentiable: ClassVar[bool] = True
    gain: float = 1.0

    def score(self, media, prompts, meta):
        return self.gain * media.flatten(1).mean(1) + torch.tensor([float(p.split()[1]) for p in prompts])


class Threaded(Bright):
    """The same, allowed in a thread."""

    concurrent: ClassVar[bool] = True


class Asks(Reward):
    """Calls a function of the number of the micro-batch, in a thread."""

    concurrent: ClassVar[bool] = True

    def __init__(self, ask):
        self.ask, self.threads = ask, []

    def score(self, media, prompts, meta):
        self.threads.append(threading.current_thread())
        assert not torch.is_grad_enabled()
        self.ask(len(self.threads) - 1)
        return media.flatten(1).mean(1)


def batch():
    return Batch(None, Condition({}), PROMPTS, [{}] * ROWS, range(ROWS), (3, 2, 2))


def context(*rewards, **keys):
    entries = [each if isinstance(each, Weighted) else Weighted(f"r{i}", each) for i, each in enumerate(rewards)]
    keys = {"backbone": Doubles(), "micro_batch": MICRO, **keys}
    return Context(sampler=Ode(), noise=LogitNormal(), rng=Rng((0,), []), rewards=entries, **keys)


def latents(seed=0):
    return torch.rand(ROWS, 3, 2, 2, generator=torch.Generator().manual_seed(seed))


def reward_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("reward ")]


def test_threads_change_no_bit():
    x0, plain = latents(), [Weighted("a", Bright(0.3), 2.0), Weighted("b", Bright(7.0), -0.1)]
    threaded = [Weighted("a", Threaded(0.3), 2.0), Weighted("b", Bright(7.0), -0.1)]
    one, other = context(*plain).score(x0, batch()), context(*threaded).score(x0, batch())
    assert torch.equal(one.total, other.total)
    assert all(torch.equal(one.each[name], other.each[name]) for name in ("a", "b"))
    assert one.total.dtype == torch.float64
    assert reward_threads() == []


def test_the_next_rows_are_made_while_a_concurrent_reward_scores():
    """The first micro-batch is scored only once the second was added; on one thread this would wait forever."""
    second = threading.Event()
    waits = Asks(lambda number: None if number or second.wait(WAIT) else pytest.fail("the second was never added"))
    ctx, x0 = context(waits), latents()
    with ctx.scoring(batch()) as scoring:
        scoring.add(x0[:MICRO])
        scoring.add(x0[MICRO : 2 * MICRO])
        second.set()
        for first in range(2 * MICRO, ROWS, MICRO):
            scoring.add(x0[first : first + MICRO])
        scores = scoring.result()
    assert torch.equal(scores.total, 2 * x0.flatten(1).mean(1).double())
    assert len({*waits.threads}) == 1
    assert threading.current_thread() not in waits.threads
    assert reward_threads() == []


def test_few_micro_batches_wait_for_a_slow_reward():
    """Media that wait are in memory: while the first are scored, two more are decoded, and no others."""
    backbone, all_decoded = Doubles(), threading.Event()
    slow, counts = Asks(lambda number: (all_decoded.wait(0.2), counts.append(backbone.calls))), []
    with context(slow, backbone=backbone).scoring(batch()) as scoring:
        for first in range(0, ROWS, MICRO):
            scoring.add(latents()[first : first + MICRO])
        all_decoded.set()
        scoring.result()
    assert counts[0] <= 3
    assert len(counts) == ROWS // MICRO


def fail(error):
    def ask(number):
        if number == 1:
            raise error

    return ask


@pytest.mark.parametrize(
    "error",
    [PluginError("it is down"), NonFinite("it is odd"), KeyboardInterrupt(), SystemExit(3), MemoryError("full")],
    ids=lambda error: type(error).__name__,
)
def test_an_error_in_a_thread_is_raised_where_the_samples_are_made(error):
    reward = Asks(fail(error))
    with pytest.raises(type(error)) as found:
        context(reward).score(latents(), batch())
    assert found.value is error
    assert len(reward.threads) < ROWS // MICRO
    assert reward_threads() == []


def test_a_wrong_result_in_a_thread_names_the_reward():
    class Short(Threaded):
        def score(self, media, prompts, meta):
            return [1.0]

    with pytest.raises(PluginError, match=r"reward 'r0', Short .*gave float32 \[1\] for 2 samples"):
        context(Short()).score(latents(), batch())


def test_an_error_of_the_sampler_ends_the_threads_and_drops_what_waits():
    started, go = threading.Event(), threading.Event()
    reward = Asks(lambda number: (started.set(), go.wait(WAIT)))

    def sampled():
        with context(reward).scoring(batch()) as scoring:
            scoring.add(latents()[:MICRO])
            scoring.add(latents()[MICRO : 2 * MICRO])
            assert started.wait(WAIT)
            threading.Timer(0.1, go.set).start()
            raise Stopped(3)

    with pytest.raises(Stopped):
        sampled()
    assert len(reward.threads) == 1
    assert reward_threads() == []


def test_held_out_scores_are_reported_and_not_returned():
    reported, x0 = {}, latents()
    held = [Weighted("strict", Threaded(5.0)), Weighted("other", Bright(2.0))]
    ctx = context(Bright(), held_out=held, report=reported.__setitem__)
    scores, alone = ctx.score(x0, batch()), context(Bright()).score(x0, batch())
    assert torch.equal(scores.total, alone.total)
    assert [*scores.each] == ["r0"]
    assert [*scores.metrics] == ["reward"]
    assert [*reported] == ["held_out/strict", "held_out/other"]
    assert torch.equal(reported["held_out/strict"], context(Bright(5.0)).score(x0, batch()).total)
    assert ctx.backbone.calls == ROWS // MICRO  # decoded once for all rewards


def test_a_held_out_score_that_is_not_finite_stops_also_a_stage_that_skips():
    with pytest.raises(PluginError, match=r"held out: reward 'bad' is not finite for \['row 0', 'row 1', 'row 2'\]"):
        context(Bright(), held_out=[Weighted("bad", Bright(float("nan")))]).score(latents(), batch())


def test_held_out_scores_of_media_with_a_graph_have_none():
    reported, x0 = {}, latents().requires_grad_()
    ctx = context(Bright(), held_out=[Weighted("strict", Bright(5.0))], report=reported.__setitem__)
    (slope,) = torch.autograd.grad(ctx.score(x0, batch()).total.sum(), x0)
    torch.testing.assert_close(slope, torch.full_like(slope, 2 / 12))
    assert not reported["held_out/strict"].requires_grad
    torch.testing.assert_close(reported["held_out/strict"], context(Bright(5.0)).score(latents(), batch()).total)


def test_normalized_rewards_have_equal_say_whatever_their_scale():
    x0 = latents()
    small = Weighted("small", Bright(1e-3), 2.0, "batch")
    plain = context(small, Weighted("large", Bright(1e3), -1.0)).score(x0, batch())
    scores = context(small, Weighted("large", Bright(1e3), -1.0, "batch")).score(x0, batch())
    expected = sum(
        weight * (values - values.mean()) / (values.std(correction=0) + 1e-4)
        for weight, values in ((2.0, scores.each["small"]), (-1.0, scores.each["large"]))
    )
    torch.testing.assert_close(scores.total, expected)
    assert torch.equal(scores.each["large"], plain.each["large"])
    torch.testing.assert_close(scores.metrics["reward"], 2 * scores.each["small"] - scores.each["large"])
    assert torch.equal(scores.metrics["reward/large"], scores.each["large"])


def test_normalization_is_over_all_ranks():
    """This rank has half of the rows; its scores are those that one process gives to the same rows."""
    x0, entry = latents(), Weighted("only", Bright(), 1.0, "batch")
    whole = context(entry).score(x0, batch()).total
    raw = context(Bright()).score(x0, batch()).total
    half = batch()[: ROWS // 2]
    gather = lambda mine: raw if mine.dtype == torch.float64 else torch.ones(ROWS, dtype=torch.bool)  # noqa: E731
    here = context(entry, gather=gather).score(x0[: ROWS // 2], half).total
    torch.testing.assert_close(here, whole[: ROWS // 2], rtol=0, atol=1e-12)


def test_equal_scores_are_normalized_to_0():
    class Constant(Reward):
        def score(self, media, prompts, meta):
            return torch.full((len(media),), 0.1)

    assert context(Weighted("c", Constant(), 1.0, "batch")).score(latents(), batch()).total.tolist() == [0.0] * ROWS


def test_unknown_normalizations_are_refused():
    with pytest.raises(ValueError, match="'normalize' must be one of 'none', 'batch', not 'group'"):
        Weighted("r", Bright(), 1.0, "group")
