"""check_sampler tests the transitions of a sampler and their density."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from attrs import frozen

from corefit.flow import interpolate
from corefit.testing.checks import LAYOUTS, close, expect, normal
from corefit.testing.keys import check_keys
from corefit.testing.syncs import watched
from corefit.types import Sampler, Step

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GRID = (1.0, 0.97, 0.9, 0.75, 0.5, 0.3, 0.1, 0.0)


@frozen(eq=False)
class State:
    """Points x [B, D] at sigma [B] on straight lines from clean latents x0 to noise, with the exact velocity v."""

    x0: Tensor
    noise: Tensor
    x: Tensor
    v: Tensor
    sigma: Tensor

    @staticmethod
    def at(sigma: Tensor, dimensions: int = 48) -> State:
        x0, noise = (normal(seed, (len(sigma), dimensions)).to(sigma.dtype) for seed in (1, 2))
        return State(x0, noise, interpolate(x0, noise, sigma), noise - x0, sigma)


def check_sampler(sampler: Sampler, *, density: bool = True, marginals: bool = True) -> None:
    """Raise an AssertionError that names the problem unless `sampler` does what `corefit.types.Sampler` says.

    Mean and std must be finite on a whole grid, and std 0 if `stochastic` is False; time must run from 1 to 0; a row
    must step in the same way alone and in a batch, in any layout, in float32 and float64; `step` must not draw, change
    its inputs in place or read values on the host; log_prob must have a gradient, and its density integrate to 1.

    density    False for a sampler that documents a log_prob other than the Gaussian's mean over dimensions
    marginals  False for a sampler that documents other marginals: with an exact velocity, short steps must otherwise
               lead to signal 1 - sigma_next and noise sigma_next
    """
    try:
        check_keys(type(sampler), Sampler)
        _check_transitions(sampler)
        _check_dtypes(sampler)
        _check_rows_and_layouts(sampler)
        if marginals:
            _check_direction(sampler)
            _check_marginals(sampler)
        _check_syncs(sampler)
        if sampler.stochastic:
            _check_gradient(sampler)
            if density:
                _check_density(sampler)
    except AssertionError as error:
        raise AssertionError(f"{type(sampler).__name__}: {error}") from error


def _levels(dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return sigma and sigma_next [7] of the whole grid, in float64 by default."""
    import torch

    grid = torch.tensor(GRID, dtype=dtype or torch.float64)
    return grid[:-1], grid[1:]


def _check_transitions(sampler: Sampler) -> None:
    """Check shapes, finite numbers on a whole grid, std >= 0 and `stochastic`, no draws and no changed inputs."""
    import torch

    sigma, after = _levels(torch.float32)
    state = State.at(sigma)
    inputs = (state.x, state.v, sigma, after)
    before = [t.clone() for t in inputs]
    step, again = sampler.step(*inputs), sampler.step(*inputs)
    expect(
        all(torch.equal(one, other) for one, other in zip(inputs, before, strict=True)),
        "step() changes its inputs in place; compute new tensors",
    )
    expect(
        step.mean.shape == state.x.shape and step.std.shape == sigma.shape,
        f"for x {list(state.x.shape)} and sigma {list(sigma.shape)}, mean is {list(step.mean.shape)} and std "
        f"{list(step.std.shape)}; mean has x's shape, std is [B] (corefit.flow.expand_like broadcasts it)",
    )
    finite = step.mean.isfinite().all(1) & step.std.isfinite()
    worst = [(round(float(s), 4), round(float(n), 4)) for s, n, ok in zip(sigma, after, finite, strict=True) if not ok]
    expect(
        not worst,
        f"mean or std is not finite from sigma to sigma_next in {worst}: guard divisions by sigma or 1 - sigma, "
        "and roots of sigma - sigma_next (time runs from 1 to 0, so sigma_next - sigma is negative)",
    )
    expect(bool((step.std >= 0).all()), "std is negative; it is a standard deviation, sd * sqrt(sigma - sigma_next)")
    expect(
        torch.equal(step.mean, again.mean) and torch.equal(step.std, again.std),
        "step() gives another mean or std when called again: it must not draw; corefit.rollout adds std * noise",
    )
    _check_stochastic(sampler, step)


def _check_stochastic(sampler: Sampler, step: Step) -> None:
    noisy = bool((step.std > 0).any())
    if sampler.stochastic:
        expect(noisy, "`stochastic` is True, but std is 0 everywhere: return False, or std > 0")
    else:
        largest = float(step.std.max())
        expect(not noisy, f"`stochastic` is False, but std is up to {largest:.3g}: return True, or std 0")


def _check_dtypes(sampler: Sampler) -> None:
    """Check that float64 is kept, and that half precision is converted to float32 before any arithmetic."""
    import torch

    state, (_, after) = State.at(_levels()[0]), _levels()
    step = sampler.step(state.x, state.v, state.sigma, after)
    expect(
        step.mean.dtype == step.std.dtype == torch.float64,
        f"float64 inputs give a mean in {step.mean.dtype} and a std in {step.std.dtype}; keep float64",
    )
    sigma, after = _levels(torch.float32)
    for half in (torch.bfloat16, torch.float16):
        x, v = state.x.to(half), state.v.to(half)
        step, exact = sampler.step(x, v, sigma, after), sampler.step(x.float(), v.float(), sigma, after)
        expect(
            step.mean.dtype == torch.float32 and close(step.mean, exact.mean, 1e-6),
            f"{half} inputs are stepped in {step.mean.dtype} or rounded: use corefit.flow.upcast(x) and upcast(v)",
        )


def _check_rows_and_layouts(sampler: Sampler) -> None:
    """Check that a row's transition is the same alone and in a batch, and in every latent layout."""
    sigma, after = _levels()
    state = State.at(sigma)
    whole = sampler.step(state.x, state.v, sigma, after)
    for i in range(len(sigma)):
        row = slice(i, i + 1)
        alone = sampler.step(state.x[row], state.v[row], sigma[row], after[row])
        expect(
            close(alone.mean, whole.mean[row], 1e-9) and close(alone.std, whole.std[row], 1e-9),
            "a row steps differently alone than among others: step() must treat every row by itself",
        )
    for name, shape in LAYOUTS.items():
        layout = (len(sigma), *shape)
        try:
            step = sampler.step(state.x.reshape(layout), state.v.reshape(layout), sigma, after)
        except Exception as error:
            raise AssertionError(f"step() fails on {name}: {error}; broadcast with corefit.flow.expand_like") from error
        expect(
            step.mean.shape == layout and close(step.mean.reshape(state.x.shape), whole.mean, 1e-9),
            f"the same numbers as {name} give another mean: elementwise arithmetic and corefit.flow.expand_like only",
        )
        expect(close(step.std, whole.std, 1e-9), f"the same numbers as {name} give another std")


def _check_syncs(sampler: Sampler) -> None:
    """Check that a step reads no value of x, v, sigma or sigma_next on the host."""
    import torch

    sigma, after = _levels(torch.float32)
    state = State.at(sigma)
    with watched([state, after]) as reads:
        step = sampler.step(state.x, state.v, sigma, after)
        if sampler.stochastic:
            sampler.log_prob(step.mean, step)
    reads.expect_none(
        "sigma and sigma_next are tensors [B] on the device, with a level of each row: write torch.where(mask, x, y) "
        "for `if`, and keep numbers in tensors"
    )


def _coefficients(state: State, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coefficients (a, b), each [B], of the least-squares fit mean = a x0 + b noise."""
    import torch

    basis = torch.stack([state.x0, state.noise], -1)
    solution = torch.linalg.lstsq(basis, mean[..., None]).solution[..., 0]
    return solution[:, 0], solution[:, 1]


def _check_direction(sampler: Sampler) -> None:
    """Check that a step with an exact velocity brings x nearer to the clean latents."""
    sigma, after = (level[1:-1] for level in _levels())
    state = State.at(sigma)
    signal, _ = _coefficients(state, sampler.step(state.x, state.v, sigma, after).mean)
    expect(
        bool((signal > 1 - sigma).all()),
        f"time runs the wrong way: from sigma {float(sigma[0]):.2f} to {float(after[0]):.2f} with the exact velocity "
        f"noise - x0, the share of x0 in the mean goes from {1 - float(sigma[0]):.3f} to {float(signal[0]):.3f} "
        f"instead of {1 - float(after[0]):.3f}. sigma_next < sigma, so dt = sigma_next - sigma is negative, and the "
        "mean moves by v * dt",
    )


def _check_marginals(sampler: Sampler) -> None:
    """Check for signal 1 - sigma_next, and noise sigma_next in mean and std together, up to first order in dt.

    An error of second order, divided by dt, shrinks with dt; one of first order stays.
    """
    import torch

    sigma = torch.tensor([0.95, 0.8, 0.5, 0.2], dtype=torch.float64)
    rates = [_excess(sampler, sigma, dt) for dt in (1e-3, 1e-4)]
    fixes = (
        "the mean must have 1 - sigma_next of x0 (dt = sigma_next - sigma, v = noise - x0)",
        "std must be the whole standard deviation of the step (with its sqrt(-dt)), and the mean must give up as "
        "much noise as std adds (the score term of an SDE's drift)",
    )
    for coarse, fine, what in zip(*rates, ("signal", "noise"), strict=True):
        worst = int((fine - 0.5 * coarse).argmax())
        expect(
            bool((fine <= 0.5 * coarse + 1e-8).all()),
            f"the {what} is off by {float(fine[worst]):.3g} dt at sigma {float(sigma[worst])}, however short the step, "
            f"for an exact velocity: {fixes[what == 'noise']}; pass marginals=False if this is meant",
        )
    if not sampler.stochastic:
        state, after = State.at(sigma), sigma - 0.15
        expect(
            close(sampler.step(state.x, state.v, sigma, after).mean, interpolate(state.x0, state.noise, after), 1e-6),
            "a deterministic step with an exact velocity leaves the straight line from noise to x0",
        )


def _excess(sampler: Sampler, sigma: Tensor, dt: float) -> tuple[Tensor, Tensor]:
    """Return |error| / dt, [B] each, of the signal and of the noise variance after a step of length dt."""
    state, after = State.at(sigma), sigma - dt
    step = sampler.step(state.x, state.v, sigma, after)
    signal, kept = _coefficients(state, step.mean)
    return (signal - (1 - after)).abs() / dt, (kept**2 + step.std**2 - after**2).abs() / dt


def _noisy(sampler: Sampler) -> tuple[Tensor, Tensor]:
    """Return sigma and sigma_next of those steps of the grid whose std is above 0."""
    sigma, after = _levels()
    state = State.at(sigma)
    noisy = sampler.step(state.x, state.v, sigma, after).std > 0
    return sigma[noisy], after[noisy]


def _check_gradient(sampler: Sampler) -> None:
    """Check that log_prob [B] of a stored state is finite, and that its gradient reaches the velocity."""
    import torch

    sigma, after = _noisy(sampler)
    state = State.at(sigma)
    v = state.v.clone().requires_grad_()
    step = sampler.step(state.x, v, sigma, after)
    x_next = (step.mean + step.std[:, None] * normal(3, state.x.shape)).detach()
    log_prob = sampler.log_prob(x_next, step)
    expect(
        log_prob.shape == sigma.shape,
        f"log_prob is {list(log_prob.shape)} for {len(sigma)} rows; it is [B], the mean over all but the first axis",
    )
    expect(bool(log_prob.isfinite().all()), "log_prob is not finite at a state that the step itself drew")
    expect(
        log_prob.requires_grad, "log_prob has no gradient with respect to the velocity: do not detach mean in step()"
    )
    (grad,) = torch.autograd.grad(log_prob.sum(), v, allow_unused=True, materialize_grads=True)
    reached = grad.isfinite().all() & (grad != 0).any(1).all()
    expect(
        bool(reached), "the gradient of log_prob with respect to the velocity is 0, missing or not finite in some row"
    )


def _check_density(sampler: Sampler) -> None:
    """Check that exp(log_prob) integrates to 1 in one dimension, and that log_prob is a mean over dimensions."""
    import torch

    width, number = 10.0, 4001
    for sigma, after in zip(*_noisy(sampler), strict=True):
        state = State.at(sigma.expand(1), dimensions=1)
        one = sampler.step(state.x, state.v, sigma.expand(1), after.expand(1))
        z = torch.linspace(-width, width, number, dtype=torch.float64)
        step = Step(one.mean.expand(number, 1), one.std.expand(number))
        density = sampler.log_prob(one.mean + one.std * z[:, None], step).exp()
        integral = float(torch.trapezoid(density, one.std * z))
        expect(
            math.isfinite(integral) and abs(integral - 1) < 1e-3,
            f"the density does not integrate to 1 but to {integral:.4g}, from sigma {float(sigma):.3g} to "
            f"{float(after):.3g}: log_prob is -(x_next - mean)^2 / (2 std^2) - log(std) - log(2 pi) / 2 "
            "(corefit.flow.log_prob); pass density=False if another is documented",
        )
    _check_mean_over_dimensions(sampler)


def _check_mean_over_dimensions(sampler: Sampler) -> None:
    sigma, after = (level[:1] for level in _noisy(sampler))
    state = State.at(sigma)
    step = sampler.step(state.x, state.v, sigma, after)
    x_next = step.mean + step.std[:, None] * normal(3, state.x.shape)
    number = x_next.shape[1]
    alone = sampler.log_prob(x_next.mT, Step(step.mean.mT, step.std.expand(number)))
    whole = sampler.log_prob(x_next, step)
    expect(
        close(whole, alone.mean(0, keepdim=True), 1e-6),
        f"log_prob of {number} numbers is {float(whole.detach()):.4g}, the mean of theirs {float(alone.mean()):.4g}: "
        "take the mean over all but the first axis, not the sum (corefit.flow.per_sample)",
    )
