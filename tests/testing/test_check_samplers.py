"""check_sampler passes what is right, and names what is wrong: one deliberately wrong sampler for each mistake."""

import pytest
import torch

from corefit import Sampler, Step
from corefit.flow import denoised, expand_like, predicted_noise, upcast
from corefit.rollout.samplers import Cps, DanceSde, FlowSde, Ode
from corefit.testing import check_sampler


@pytest.mark.parametrize(
    "sampler",
    [Ode(), FlowSde(), FlowSde(0), FlowSde(1.2), DanceSde(), DanceSde(0), Cps(), Cps(0), Cps(1.0)],
    ids=repr,
)
def test_built_in_samplers_pass(sampler):
    check_sampler(sampler)


def test_a_documented_density_passes_when_told():
    check_sampler(Cps(density="published"), density=False)


# samplers that are wrong


def euler(x, v, sigma, sigma_next):
    return upcast(x) + expand_like(sigma_next - sigma, x) * upcast(v)


class Deterministic(Sampler):
    """An Ode to spoil."""

    stochastic = False

    def step(self, x, v, sigma, sigma_next):
        return Step(euler(x, v, sigma, sigma_next), 0 * sigma)


class Stochastic(Sampler):
    """Cps to spoil: half of the noise variance is drawn anew."""

    def step(self, x, v, sigma, sigma_next):
        x, v = upcast(x), upcast(v)
        std = sigma_next * 0.5**0.5
        return Step(
            expand_like(1 - sigma_next, x) * denoised(x, v, sigma) + expand_like(std, x) * predicted_noise(x, v, sigma),
            std,
        )


class WrongTime(Deterministic):
    def step(self, x, v, sigma, sigma_next):
        return Step(euler(x, v, sigma_next, sigma), 0 * sigma)


class RootOfNegative(Stochastic):
    def step(self, x, v, sigma, sigma_next):
        step = super().step(x, v, sigma, sigma_next)
        return Step(step.mean, (sigma_next - sigma).sqrt())


class SecretlyStochastic(Stochastic):
    stochastic = False


class SecretlyDeterministic(Deterministic):
    stochastic = True


class NegativeStd(Stochastic):
    def step(self, x, v, sigma, sigma_next):
        step = super().step(x, v, sigma, sigma_next)
        return Step(step.mean, -step.std)


class NoScore(Stochastic):
    """Noise added to the ODE's step, which gives none up."""

    def step(self, x, v, sigma, sigma_next):
        return Step(euler(x, v, sigma, sigma_next), 0.7 * (sigma - sigma_next).sqrt())


class PerUnitTime(Sampler):
    """Flow-SDE that returns sd for std."""

    def step(self, x, v, sigma, sigma_next):
        step = DanceSde(0.7).step(x, v, sigma, sigma_next)
        return Step(step.mean, step.std / (sigma - sigma_next).sqrt())


class TooFar(Deterministic):
    def step(self, x, v, sigma, sigma_next):
        return Step(upcast(x) + 1.5 * expand_like(sigma_next - sigma, x) * upcast(v), 0 * sigma)


class Curved(Deterministic):
    def step(self, x, v, sigma, sigma_next):
        dt = sigma_next - sigma
        return Step(euler(x, v, sigma, sigma_next) + expand_like(dt**2, x) * upcast(v), 0 * sigma)


class NoConstant(Stochastic):
    def log_prob(self, x_next, step):
        return super().log_prob(x_next, step) + 1


class Summed(Stochastic):
    def log_prob(self, x_next, step):
        return super().log_prob(x_next, step) * x_next[0].numel()


class PerElement(Stochastic):
    def log_prob(self, x_next, step):
        std = expand_like(step.std, x_next)
        return -((x_next - step.mean) ** 2) / (2 * std**2) - std.log() - 0.918939


class NoGradient(Stochastic):
    def step(self, x, v, sigma, sigma_next):
        return super().step(x, v.detach(), sigma, sigma_next)


class Halves(Deterministic):
    def step(self, x, v, sigma, sigma_next):
        dt = expand_like(sigma_next - sigma, x)
        return Step(x + dt.to(x.dtype) * v, 0 * sigma)


class Singles(Deterministic):
    def step(self, x, v, sigma, sigma_next):
        return Step(euler(x.float(), v.float(), sigma.float(), sigma_next.float()), 0 * sigma)


class ImageSampler(Deterministic):
    def step(self, x, v, sigma, sigma_next):
        dt = (sigma_next - sigma).view(-1, *(1,) * (max(x.ndim, 4) - 1))
        return Step(
            (upcast(x) + dt * upcast(v)).reshape(x.shape) if x.ndim > 2 else euler(x, v, sigma, sigma_next), 0 * sigma
        )


class FirstRowsTime(Deterministic):
    def step(self, x, v, sigma, sigma_next):
        return Step(upcast(x) + (sigma_next - sigma)[0] * upcast(v), 0 * sigma)


class Drawing(Stochastic):
    def step(self, x, v, sigma, sigma_next):
        step = super().step(x, v, sigma, sigma_next)
        return Step(step.mean + expand_like(step.std, x) * torch.randn(x.shape), step.std)


class Spoiling(Deterministic):
    def step(self, x, v, sigma, sigma_next):
        return Step(x.add_(expand_like(sigma_next - sigma, x) * v), 0 * sigma)


class WideStd(Stochastic):
    def step(self, x, v, sigma, sigma_next):
        step = super().step(x, v, sigma, sigma_next)
        return Step(step.mean, expand_like(step.std, x))


WRONG_SAMPLERS = [
    (WrongTime, "time runs the wrong way"),
    (RootOfNegative, r"not finite.*sigma_next - sigma is negative"),
    (SecretlyStochastic, r"`stochastic` is False, but std is up to 0\."),
    (SecretlyDeterministic, "`stochastic` is True, but std is 0 everywhere"),
    (NegativeStd, "std is negative"),
    (NoScore, "noise is off by .*score term"),
    (PerUnitTime, "noise is off by .*whole standard deviation"),
    (TooFar, "signal is off by 0.5 dt"),
    (Curved, "leaves the straight line"),
    (NoConstant, r"does not integrate to 1 but to 2\.718"),
    (Summed, "take the mean over all but the first axis, not the sum"),
    (PerElement, r"log_prob is \[\d, 48\] for \d rows; it is \[B\]"),
    (NoGradient, "no gradient with respect to the velocity"),
    (Halves, "bfloat16 inputs are stepped in torch.bfloat16"),
    (Singles, r"float64 inputs give a mean in torch\.float32"),
    (ImageSampler, r"packed tokens \[B, L, C\]"),
    (FirstRowsTime, "a row steps differently alone"),
    (Drawing, "it must not draw"),
    (Spoiling, "changes its inputs in place"),
    (WideStd, r"std \[7, 1\]; mean has x's shape, std is \[B\]"),
]


@pytest.mark.parametrize(("cls", "problem"), WRONG_SAMPLERS, ids=lambda each: getattr(each, "__name__", ""))
def test_a_wrong_sampler_is_named(cls, problem):
    with pytest.raises(AssertionError, match=f"^{cls.__name__}: .*{problem}"):
        check_sampler(cls())


@pytest.mark.parametrize("cls", [Deterministic, Stochastic])
def test_the_samplers_that_were_spoiled_are_right(cls):
    check_sampler(cls())


def test_a_sampler_without_the_marginals_passes_when_told():
    check_sampler(NoScore(), marginals=False)
