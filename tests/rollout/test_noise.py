"""Densities and weights of training noise against diffusers and HY-SOAR."""

from types import SimpleNamespace

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vectors import DTYPES, Draws, golden

from corefit import Context
from corefit.errors import PluginError
from corefit.flow import shifted
from corefit.rng import Rng
from corefit.rollout.noise import CosMap, LogitNormal, Mode, SigmaSqrt, Uniform
from corefit_soar import table

SCHEMES = {
    "sigma_sqrt": SigmaSqrt(),
    "cosmap": CosMap(),
    "logit_normal": LogitNormal(),
    "mode": Mode(),
    "none": Uniform(),
}
MANY = 20_000


@pytest.fixture
def vectors():
    return golden("sd3_weighting")


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_the_published_ones(vectors, scheme, precision):
    weight = SCHEMES[scheme].weight(vectors["sigma"].to(DTYPES[precision]))
    vectors.check(f"weight.{scheme}.{precision}", weight)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.8)])
def test_logit_normal_times_are_the_published_ones(vectors, mean, std):
    time = LogitNormal(mean, std).time(vectors["density.normal_draws"])
    vectors.check(f"density.logit_normal.m{mean}.s{std}", time)


@pytest.mark.parametrize("scale", [1.29, 0.0])
def test_mode_times_are_the_published_ones(vectors, scale):
    vectors.check(f"density.mode.scale{scale}", Mode(scale).time(vectors["density.uniform_draws"]))


@pytest.mark.parametrize("noise", [Uniform(), CosMap(), SigmaSqrt()], ids=repr)
def test_the_other_schemes_draw_uniform_times(vectors, noise):
    draws = vectors["density.uniform_draws"]
    time = noise.sample(len(draws), 1.0, Draws(uniform=[draws]))
    vectors.check("density.uniform", time)


def test_table_of_hy_soar(vectors):
    """Its times run our way, t = 1 is noise; the table look-up is corefit_soar's."""
    sigma = table.sigma_at(vectors["density.uniform_draws"], vectors.meta["shift"])
    vectors.check("convention.hysoar.sigma", sigma)


def test_table_of_diffusers_runs_the_other_way(vectors):
    """Its draw u counts from noise: our t is 1 - u, up to one table entry."""
    draws, shift = vectors["density.uniform_draws"], vectors.meta["shift"]
    theirs = vectors["convention.diffusers.sigma"]
    ours = Uniform().sample(len(draws), shift, Draws(uniform=[1 - draws]))
    entry = shifted((1 - draws + 1e-3).clamp(max=1), shift) - shifted(1 - draws, shift)
    assert (theirs >= ours - 1e-6).all()
    assert (theirs <= ours + entry + 1e-6).all()


@pytest.mark.parametrize(
    ("mirrored", "noise"),
    [
        (True, LogitNormal()),
        (True, Mode()),
        (True, Uniform()),
        (False, LogitNormal(0.5, 0.8)),
    ],
    ids=lambda x: str(x),
)
def test_one_law_in_both_conventions_but_for_the_logit_mean(mirrored, noise):
    """diffusers' t is our 1 - t: the same law where it is symmetric, minus the mean where it is not."""
    time, levels = law(noise), torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]).double()
    same = torch.allclose(time.quantile(levels), (1 - time).quantile(levels), atol=2e-3)
    assert same == mirrored
    if isinstance(noise, LogitNormal):
        opposite = 1 - law(attrs.evolve(noise, mean=-noise.mean))
        torch.testing.assert_close(time.quantile(levels), opposite.quantile(levels), atol=2e-3, rtol=0)


def law(noise):
    """Times at evenly spread draws, [MANY] float64: the law without its sampling error."""
    uniform = (torch.arange(MANY, dtype=torch.float64) + 0.5) / MANY
    draws = Draws(normal=[torch.special.ndtri(uniform)], uniform=[uniform])
    return noise.sample(MANY, 1.0, draws)


@pytest.mark.parametrize("noise", SCHEMES.values(), ids=SCHEMES.keys())
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_samples_are_levels_of_the_law(noise, shift):
    sigma = noise.sample(2000, shift, Rng(("test",), range(2000)))
    assert (sigma.shape, sigma.dtype) == ((2000,), torch.float32)
    assert ((sigma > 0) & (sigma <= 1)).all()
    expected = shifted(law(noise), shift)
    assert float(sigma.mean()) == pytest.approx(float(expected.mean()), abs=0.03)
    assert float(sigma.std()) == pytest.approx(float(expected.std()), abs=0.03)


@pytest.mark.parametrize("noise", [Uniform(), CosMap(), SigmaSqrt(), Mode()], ids=repr)
@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24])
def test_a_level_is_never_zero(noise, draw):
    """NoiseWeighting.sample promises (0, 1], and uniform draws reach 0 (not 1)."""
    sigma = noise.sample(1, 3.0, Draws(uniform=[torch.tensor([draw])]))
    assert 0 < float(sigma) <= 1


def test_more_mean_is_more_noise():
    assert law(LogitNormal(0.5)).mean() > law(LogitNormal()).mean() > law(LogitNormal(-0.5)).mean()


@pytest.mark.parametrize(
    ("noise", "flat"), [(CosMap(), False), (Uniform(), True), (LogitNormal(), True)], ids=lambda x: str(x)
)
def test_a_density_is_not_counted_twice(noise, flat):
    weight = noise.weight(torch.linspace(0.1, 0.9, 5))
    assert bool((weight == 1).all()) == flat


def test_cosmap_weight_is_the_density_that_it_replaces():
    sigma = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    assert float(torch.trapezoid(CosMap().weight(sigma), sigma)) == pytest.approx(1, abs=1e-6)


@given(st.floats(0, 1), st.floats(1e-4, 0.5))
def test_the_floor_bounds_sigma_sqrt(sigma, floor):
    weight = float(SigmaSqrt(floor).weight(torch.tensor([sigma])))
    assert weight == pytest.approx(max(sigma, floor) ** -2, rel=1e-5)


@pytest.mark.parametrize(
    ("noise", "keys"),
    [(LogitNormal, {"std": 0}), (SigmaSqrt, {"floor": 0}), (Mode, {"scale": 2}), (Mode, {"scale": -2})],
    ids=lambda x: str(x),
)
def test_keys_out_of_range_are_refused(noise, keys):
    with pytest.raises(ValueError, match=next(iter(keys))):
        noise(**keys)


def test_a_weighting_that_gives_one_level_for_all_is_named():
    """It would be broadcast, and every sample have the same noise level."""

    class Same(Uniform):
        def sample(self, n, shift, rng):
            return super().sample(n, shift, rng)[:1]

    backbone = SimpleNamespace(shift=lambda shape: 1.0)
    ctx = Context(backbone=backbone, sampler=None, noise=Same(), rng=Rng(("a",), [0, 1, 2]))
    with pytest.raises(PluginError, match=r"Same .*gave .*1.* noise levels for 3 samples"):
        ctx.sigma(torch.zeros(3, 4))
