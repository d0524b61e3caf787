"""The arithmetic that everything else is made of, on latents of any rank."""

import math

import pytest
import torch

from corefit.flow import (
    denoised,
    expand_like,
    interpolate,
    log_prob,
    per_sample,
    predicted_noise,
    shifted,
    unshifted,
    upcast,
)

SHAPES = {
    "image": (3, 4, 2, 6),
    "video": (3, 4, 5, 2, 6),
    "tokens": (3, 8, 6),
    "as many channels as rows": (3, 3, 2, 2),
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def pair(request):
    """Clean latents, noise, levels."""
    torch.manual_seed(0)
    return (
        torch.randn(request.param).double(),
        torch.randn(request.param).double(),
        torch.tensor([0.1, 0.5, 0.9]).double(),
    )


def test_levels_broadcast_over_rows_only(pair):
    x0, _, sigma = pair
    spread = expand_like(sigma, x0)
    assert spread.shape == (3, *(1,) * (x0.ndim - 1))
    for row in range(3):
        assert torch.equal((spread * x0)[row], sigma[row] * x0[row])


def test_a_state_and_its_velocity_give_back_both_ends(pair):
    x0, noise, sigma = pair
    x, v = interpolate(x0, noise, sigma), noise - x0
    torch.testing.assert_close(denoised(x, v, sigma), x0)
    torch.testing.assert_close(predicted_noise(x, v, sigma), noise)


def test_ends_of_the_line_are_exact(pair):
    x0, noise, sigma = pair
    assert torch.equal(interpolate(x0, noise, 0 * sigma), x0)
    assert torch.equal(interpolate(x0, noise, 0 * sigma + 1), noise)


def test_velocity_is_the_derivative_of_the_state(pair):
    x0, noise, sigma = pair
    sigma.requires_grad_()
    (slope,) = torch.autograd.grad(interpolate(x0, noise, sigma).sum(), sigma)
    torch.testing.assert_close(slope, (noise - x0).flatten(1).sum(1))


def test_per_sample_is_the_mean_of_each_row(pair):
    x0, _, _ = pair
    torch.testing.assert_close(per_sample(x0), torch.stack([row.mean() for row in x0]))


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5, 12.0])
def test_shift_keeps_the_ends_and_is_undone(shift):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    sigma = shifted(t, shift)
    assert sigma[0] == 0
    assert sigma[-1] == 1
    assert (sigma.diff() > 0).all()
    torch.testing.assert_close(unshifted(sigma, shift), t)


def test_shift_of_sd3():
    """SD3, eq. 23: sigma / (1 - sigma) = shift t / (1 - t)."""
    sigma = shifted(0.25, 3.0)
    assert sigma / (1 - sigma) == pytest.approx(3.0 * 0.25 / 0.75)


HALF = dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float32)


@pytest.mark.parametrize(("given", "used"), [*HALF.items(), (torch.float64, torch.float64)])
def test_arithmetic_is_never_below_float32(given, used):
    assert upcast(torch.zeros(1, dtype=given)).dtype == used


def test_log_prob_is_the_mean_over_dimensions_of_the_normal_density(pair):
    x, mean, std = pair
    normal = torch.distributions.Normal(mean, expand_like(std, mean))
    torch.testing.assert_close(log_prob(x, mean, std), per_sample(normal.log_prob(x)))


def test_log_prob_of_the_mean():
    x = torch.zeros(1, 5)
    assert float(log_prob(x, x, torch.ones(1))) == pytest.approx(-0.5 * math.log(2 * math.pi))


def test_log_prob_raises_a_rounded_state_before_it_squares():
    mean = torch.full((1, 64), 1 / 3)
    x = mean.bfloat16()
    assert torch.equal(log_prob(x, mean, torch.ones(1)), log_prob(x.float(), mean, torch.ones(1)))
