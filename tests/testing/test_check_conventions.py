"""What a loss that falls still hides: states, levels and targets of another convention, and what beginners write."""

import re
from pathlib import Path

import pytest
import torch
from attrs import frozen

from corefit import Supervised, Term
from corefit.flow import interpolate, per_sample
from corefit.testing import check_objective


@frozen
class Matched(Supervised):
    """Flow matching, to be spoiled."""

    def state(self, x0, noise, sigma):
        return interpolate(x0, noise, sigma)

    def level(self, sigma):
        return sigma

    def target(self, x0, noise):
        return noise - x0

    def term(self, loss, weight):
        return Term.of(weight * loss)

    def terms(self, batch, ctx):
        x0 = batch.clean
        noise, sigma = ctx.randn_like(x0), ctx.sigma(x0)
        v = ctx.backbone.velocity(self.state(x0, noise, sigma), self.level(sigma), batch.cond)
        yield self.term(per_sample((v - self.target(x0, noise)) ** 2), ctx.noise.weight(sigma))


class Swapped(Matched):
    def state(self, x0, noise, sigma):
        return interpolate(noise, x0, sigma)


class OtherState(Matched):
    def state(self, x0, noise, sigma):
        return interpolate(x0, noise, 1 - sigma)


class OtherLevel(Matched):
    def level(self, sigma):
        return 1 - sigma


class Timestep(Matched):
    def level(self, sigma):
        return 1000 * sigma


class PredictsNoise(Matched):
    def target(self, x0, noise):
        return noise


class IgnoresPrompts(Matched):
    def terms(self, batch, ctx):
        cond = ctx.dropout(batch.cond, 1.0)
        x0 = batch.clean
        noise, sigma = ctx.randn_like(x0), ctx.sigma(x0)
        yield Term.of(
            per_sample((ctx.backbone.velocity(interpolate(x0, noise, sigma), sigma, cond) - (noise - x0)) ** 2)
        )


class MeanOfBatch(Matched):
    def term(self, loss, weight):
        return Term.of(weight * loss.mean())


class MeanOfLosses(Matched):
    def term(self, loss, weight):
        return Term.of((weight * loss).mean())


class Bare(Matched):
    def term(self, loss, weight):
        return (weight * loss).sum()


HIDDEN = r"and plain flow matching brings it to .*: check that x = mix\(x0, noise, sigma\)"
WRONG = [
    (Swapped, HIDDEN),
    (OtherState, HIDDEN),
    (OtherLevel, HIDDEN),
    (PredictsNoise, HIDDEN),
    (IgnoresPrompts, HIDDEN),
    (Timestep, r"velocity at sigma \d+(\.\d)?: sigma is a noise level in \[0, 1\]"),
    (MeanOfBatch, "a row's loss must not depend on other rows"),
    (MeanOfLosses, r"Term\.of takes losses \[n\], one for each item, and got \[\]"),
    (Bare, r"terms\(\) gives Tensor and not Term: yield Term\.of\(losses\)"),
]


def test_flow_matching_passes():
    check_objective(Matched())


@pytest.mark.parametrize(("cls", "problem"), WRONG, ids=lambda each: getattr(each, "__name__", ""))
def test_another_convention_is_named(cls, problem):
    with pytest.raises(AssertionError, match=f"^{cls.__name__}: .*{problem}"):
        check_objective(cls())


def test_an_exception_is_told_with_the_users_line():
    class Fails(Matched):
        def term(self, loss, weight):
            return Term.of(loss @ torch.ones(7777))

    with pytest.raises(AssertionError) as told:
        check_objective(Fails())
    where = r"Fails: fails on images \[B, C, H, W\], test_check_conventions\.py:(\d+): RuntimeError"
    found = re.match(where, str(told.value))
    assert found
    assert "torch.ones(7777)" in Path(__file__).read_text().splitlines()[int(found[1]) - 1]
