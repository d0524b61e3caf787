"""The sampling loop against whole published trajectories, and what it does besides."""

from itertools import pairwise

import pytest
import torch
from vectors import Analytic, Draws, golden

from corefit import Condition
from corefit.flow import shifted
from corefit.rollout import generate, rollout
from corefit.rollout.samplers import Cps, DanceSde, FlowSde, Ode


@pytest.fixture
def vectors():
    return golden("trajectories")


def walk(vectors, sampler, stochastic=None):
    """The transitions of the golden start, noise, grid and model."""
    meta = vectors.meta
    model = Analytic(torch.tensor([meta["a"], meta["b"], meta["k"]]))
    noise = Draws(normal=list(vectors["noise"]))
    steps = list(
        rollout(
            model,
            sampler,
            vectors["x_init"],
            Condition({"c": vectors["cond"]}),
            vectors["sigmas"],
            guidance=meta["cfg"],
            randn_like=lambda x: noise.randn(x.shape),
            stochastic=stochastic,
        )
    )
    assert noise.spent or not sampler.stochastic
    return steps


def latents(steps):
    return torch.stack([steps[0].x, *(t.x_next for t in steps)])


def log_probs(sampler, steps):
    return torch.stack([sampler.log_prob(t.x_next, t.step) for t in steps], 1)


def test_ode(vectors):
    vectors.check("ode.latents", latents(walk(vectors, Ode())))


def test_flow_sde(vectors):
    sampler = FlowSde(0.7)
    steps = walk(vectors, sampler)
    vectors.check("flow_sde.a0.7.latents", latents(steps))
    vectors.check("flow_sde.a0.7.log_probs", log_probs(sampler, steps))
    std = torch.stack([t.step.std[0] / (t.sigma - t.sigma_next)[0].sqrt() for t in steps])
    vectors.check("flow_sde.a0.7.std_dev_t", std)


def test_cps(vectors):
    sampler = Cps(0.7, density="published")
    steps = walk(vectors, sampler)
    vectors.check("cps.a0.7.latents", latents(steps))
    vectors.check("cps.a0.7.log_probs", log_probs(sampler, steps))
    vectors.check("cps.a0.7.std_dev_t", torch.stack([t.step.std[0] for t in steps]))


def test_cps_in_a_window(vectors):
    """Elsewhere rows take the ODE's step, which is CPS without noise up to rounding."""
    sampler, (first, last) = Cps(vectors.meta["window_noise"], density="published"), vectors.meta["window"]
    step = torch.arange(vectors.meta["N"])
    inside = (step >= first) & (step <= last)
    steps = walk(vectors, sampler, inside[:, None].expand(-1, 2))
    vectors.check("cps_window.latents", latents(steps))
    vectors.check("cps_window.log_probs", log_probs(sampler, steps)[:, inside])


def start(rows=4):
    torch.manual_seed(0)
    return torch.randn(rows, 2, 3, 3), Condition({"c": torch.linspace(-1, 1, rows)})


GRID = shifted(torch.linspace(1, 0, 6), 3.0)


@pytest.mark.parametrize("sampler", [FlowSde(0.7), DanceSde(0.3), Cps(0.7)], ids=repr)
def test_a_window_is_each_rows_own(sampler):
    """A row in its window walks as if all steps were stochastic, outside as if none were."""
    x, cond = start()
    inside = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
    for i, t in enumerate(rollout(Analytic(), sampler, x, cond, GRID, randn_like=torch.randn_like, stochastic=inside)):
        v = Analytic().velocity(t.x, t.sigma, cond)
        noisy, straight = sampler.step(t.x, v, t.sigma, t.sigma_next), Ode().step(t.x, v, t.sigma, t.sigma_next)
        for row in range(4):
            expected = noisy if inside[i, row] else straight
            assert torch.equal(t.step.mean[row], expected.mean[row])
            assert torch.equal(t.step.std[row], expected.std[row])
        assert torch.equal((t.x_next == t.step.mean).flatten(1).all(1), t.step.std == 0)


def test_transitions_are_chained():
    x, cond = start()
    steps = list(rollout(Analytic(), FlowSde(0.7), x, cond, GRID, randn_like=torch.randn_like))
    assert len(steps) == len(GRID) - 1
    assert steps[0].x is x
    for before, after in pairwise(steps):
        assert torch.equal(before.x_next, after.x)
        assert torch.equal(before.sigma_next, after.sigma)


def test_the_ode_asks_for_no_noise():
    x, cond = start()
    assert len(list(rollout(Analytic(), Ode(), x, cond, GRID))) == 5
    with pytest.raises(AssertionError, match="randn_like"):
        next(rollout(Analytic(), FlowSde(), x, cond, GRID))


def test_the_start_is_left_as_it_was():
    x, cond = start()
    kept = x.clone()
    list(rollout(Analytic(), FlowSde(), x, cond, GRID, randn_like=torch.randn_like))
    assert torch.equal(x, kept)


@pytest.mark.parametrize(("guidance", "calls"), [(1.0, 5), (4.5, 10)])
def test_forwards_a_step(guidance, calls):
    (x, cond), model = start(), Analytic()
    list(rollout(model, Ode(), x, cond, GRID, guidance=guidance))
    assert len(model.calls) == calls


def test_a_rollout_does_not_mix_rows():
    x, cond = start()
    whole = list(rollout(Analytic(), Ode(), x, cond, GRID))[-1].x_next
    alone = list(rollout(Analytic(), Ode(), x[1:2], cond[1:2], GRID))[-1].x_next
    torch.testing.assert_close(whole[1:2], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 6, 3), (4, 2, 1, 3, 3)], ids=["tokens", "video"])
def test_a_rollout_is_the_same_in_any_layout(shape):
    x, cond = start()
    flat = x.reshape(shape)
    image = generate(Analytic(), x, cond, steps=5, guidance=2.0)
    assert torch.equal(generate(Analytic(), flat, cond, steps=5, guidance=2.0).reshape(x.shape), image)


def test_generation_is_the_ode_on_the_backbones_grid():
    x, cond = start()
    last = list(rollout(Analytic(), Ode(), x, cond, Analytic().sigmas(7, ()), guidance=3.0))[-1]
    assert float(last.sigma_next[0]) == 0
    assert torch.equal(generate(Analytic(), x, cond, steps=7, guidance=3.0), last.x_next)


def test_a_finer_grid_converges():
    """The first-order method halves its error when its steps are halved."""
    x, cond = start()
    exact = generate(Analytic(), x.double(), cond, steps=2000, guidance=1.0)
    coarse, fine = (generate(Analytic(), x.double(), cond, steps=n, guidance=1.0) for n in (20, 40))
    ratio = float((coarse - exact).norm() / (fine - exact).norm())
    assert ratio == pytest.approx(2, rel=0.1)
