"""Code that makes the host wait for the device is named by file and line; arithmetic on the device is not."""

from __future__ import annotations

import contextlib
import math
import re

import numpy as np
import pytest
import torch
from attrs import frozen

from corefit import Objective, Reward, Sampler, Step, Supervised, Term
from corefit.flow import interpolate, per_sample
from corefit.rollout.noise import LogitNormal
from corefit.rollout.samplers import FlowSde, Ode
from corefit.testing import check_noise, check_objective, check_sampler
from corefit.testing.syncs import watched


def errors(batch, ctx):
    """SFT's loss of each row, [B]."""
    x0 = batch.clean
    noise, sigma = ctx.randn_like(x0), ctx.sigma(x0)
    v = ctx.backbone.velocity(interpolate(x0, noise, sigma), sigma, batch.cond)
    return per_sample((v - (noise - x0)) ** 2)


class LogsItem(Supervised):
    def terms(self, batch, ctx):
        loss = errors(batch, ctx)
        self.last = loss.mean().item()
        yield Term.of(loss)


class Branches(Supervised):
    def terms(self, batch, ctx):
        loss = errors(batch, ctx)
        if loss.isnan().any():
            raise ValueError("not a number")
        yield Term.of(loss)


class TakesMasked(Supervised):
    def terms(self, batch, ctx):
        loss = errors(batch, ctx)
        yield Term.of(loss[loss < 1e6])


class CountsOnHost(Supervised):
    def terms(self, batch, ctx):
        loss = errors(batch, ctx)
        yield Term(loss.sum(), float((loss < 1e6).sum()))


class ThroughNumpy(Supervised):
    def terms(self, batch, ctx):
        loss = errors(batch, ctx)
        yield Term.of(loss * float(np.median(loss.detach().numpy()) > -1))


class MovesToCpu(Supervised):
    def terms(self, batch, ctx):
        loss = errors(batch, ctx)
        yield Term.of(loss, seen=loss.detach().to("cpu"))


class WaitsForDraws(Supervised):
    def terms(self, batch, ctx):
        loss = errors(batch, ctx)
        yield Term.of(loss * ctx.rand(len(batch)).to(loss.device))


class Swallows(Supervised):
    """Reads in a helper, whatever it raises."""

    def terms(self, batch, ctx):
        loss = errors(batch, ctx)
        with contextlib.suppress(Exception):
            self.look(loss)
        yield Term.of(loss)

    def look(self, loss):
        return loss.tolist()


@pytest.mark.parametrize(
    ("cls", "call"),
    [
        (LogsItem, r"item\(\)"),
        (Branches, r"bool\(tensor\), as in `if tensor:`,"),
        (TakesMasked, r"tensor\[mask\], or a tensor as an index,"),
        (CountsOnHost, r"float\(tensor\)"),
        (ThroughNumpy, r"numpy\(\)"),
        (MovesToCpu, r'tensor\.to\("cpu"\)'),
        (WaitsForDraws, r"tensor\.to\(device\) without non_blocking=True, of what was made on the CPU,"),
        (Swallows, r"tolist\(\)"),
    ],
)
def test_an_objective_that_waits_for_the_device_is_named(cls, call):
    here = r"test_check_syncs\.py:\d+ makes the host wait for the device in every step"
    with pytest.raises(AssertionError, match=f"^{cls.__name__}: {call} at {here}.*torch.where"):
        check_objective(cls(), shape=(3, 4, 4))


class InTheFirstStep(Supervised):
    """A check that looks at values where it may."""

    def terms(self, batch, ctx):
        loss = errors(batch, ctx)
        if ctx.first_batch:
            assert loss.isfinite().all()
        yield Term.of(loss)


class OnTheHost(Supervised):
    """Draws, and numbers of its own, are on the CPU: reading them waits for nothing."""

    def terms(self, batch, ctx):
        loss = errors(batch, ctx)
        share = ctx.rand(len(batch))
        times = 1 + int(torch.tensor(3).item() > 2 and share[share > 2].sum() > 5)
        yield Term.of(times * loss * (1 + 0 * share.to(loss.device, non_blocking=True)))


class OfOthers(Sampler):
    """What a sampler does is its own check's business."""

    def step(self, x, v, sigma, sigma_next):
        return Ode().step(x, v, sigma, sigma_next) if float(sigma[0]) >= 0 else Step(x, sigma)


class Levels(LogitNormal):
    def weight(self, sigma):
        return super().weight(sigma) * float(sigma.sum() > 0)


class Steps(Supervised):
    uses = frozenset({"media", "noise", "sampler"})

    def terms(self, batch, ctx):
        x0, sigma = batch.clean, ctx.sigma(batch.clean)
        v = ctx.backbone.velocity(interpolate(x0, ctx.randn_like(x0), sigma), sigma, batch.cond)
        yield Term.of(ctx.noise.weight(sigma) * per_sample((ctx.sampler.step(x0, v, sigma, 0.9 * sigma).mean) ** 2))


def test_no_false_alarm():
    check_objective(InTheFirstStep(), shape=(3, 4, 4))
    check_objective(OnTheHost(), shape=(3, 4, 4))
    check_objective(Steps(), shape=(3, 4, 4), sampler=OfOthers(), noise=Levels(), learns=False)


class Tokenizes(Reward):
    """Puts tokens of its prompts on the media's device, and cuts them where the longest prompt ends."""

    def score(reward, media, prompts, meta):
        tokens = torch.tensor([[len(word) for word in prompt.split()] for prompt in prompts]).to(media.device)
        longest = int((tokens + 0 * media.flatten(1)[:, :1] > 0).sum(1).max())
        return media.flatten(1).mean(1) * tokens[:, :longest].sum(1)


@frozen
class Judged(Objective):
    """The score of the clean sample that one step from noise implies, judged in terms or in its experience too."""

    uses = frozenset({"reward"})
    num_terms = 1

    def experience(self, batch, ctx):
        with torch.no_grad():
            self.judged(batch, ctx)
        yield batch

    def judged(self, batch, ctx):
        noise, ones = ctx.rng.randn((len(batch), *batch.shape)), torch.ones(len(batch))
        media = ctx.backbone.decode(noise - ctx.backbone.velocity(noise, ones, batch.cond))
        return ctx.rewards[0].reward.score(media, batch.prompts, batch.meta)

    def terms(self, batch, ctx):
        yield Term.of(-self.judged(batch, ctx))


class JudgedOnHost(Judged):
    """Waits for the score itself."""

    def terms(self, batch, ctx):
        score = self.judged(batch, ctx)
        yield Term.of(-score if score.max().item() < 1e6 else score)


def test_an_objective_is_not_blamed_for_its_reward():
    check_objective(Judged(), reward=Tokenizes(), shape=(3, 4, 4))
    with pytest.raises(
        AssertionError, match=r"^JudgedOnHost: item\(\) at test_check_syncs\.py:\d+ makes the host wait"
    ):
        check_objective(JudgedOnHost(), reward=Tokenizes(), shape=(3, 4, 4))


@frozen
class BranchingSampler(FlowSde):
    def step(self, x, v, sigma, sigma_next):
        if (sigma >= 1).any():
            return super().step(x, v, sigma, sigma_next)
        return super().step(x, v, sigma, sigma_next)


@frozen
class DensityOnHost(FlowSde):
    def log_prob(self, x_next, step):
        return super().log_prob(x_next, step) if step.std.min().item() >= 0 else step.std


@pytest.mark.parametrize("cls", [BranchingSampler, DensityOnHost])
def test_a_sampler_that_waits_for_the_device_is_named(cls):
    with pytest.raises(AssertionError, match=rf"^{cls.__name__}: .* at test_check_syncs\.py:\d+ makes the host wait"):
        check_sampler(cls())


@frozen
class WeighsOnHost(LogitNormal):
    def weight(self, sigma):
        return torch.tensor([1.0 + 0 * s for s in sigma.tolist()])


def test_a_weighting_that_waits_for_the_device_is_named():
    with pytest.raises(AssertionError, match=r"^WeighsOnHost: tolist\(\) at .*weight\(\) runs in every step"):
        check_noise(WeighsOnHost())


# calls

READING = (
    *("x.sum().item()", "float(x.sum())", "bool((x > 0).any())", "int(i[1])", "1 if x.isfinite().all() else 0"),
    *("x.tolist()", "x.cpu()", "x.numpy()", "np.asarray(x)", "x.to('cpu')", "f'{x.sum()}'", "str(x)"),
    *("x[x > 0]", "x[i[1]]", "x[: i[1]]", "x.nonzero()", "torch.where(x > 0)", "torch.masked_select(x, x > 0)"),
    *("torch.equal(x, x)", "torch.allclose(x, x)", "x.unique()", "torch.tensor([x.sum(), x.sum()])"),
    *("math.sqrt(x.abs().sum())", "max(x[0])", "range(i[1])", "torch.full((2,), x.sum())", "torch.linalg.inv(x[:3])"),
    *("x.repeat_interleave(i, 1)", "x.detach().clone().__setitem__(x > -9, x.flatten())"),
)
STAYING = (
    *("x.where(x > 0, 0)", "x.clone().masked_fill_(x > 0, 0)", "x.clone().__setitem__(x > 0, 0.0)", "x[:, i]"),
    *("x.sum(1)[[0, 1]]", "x[:2]", "[row for row in x]", "len(x)", "x.shape[0]", "x.to(torch.float64)"),
    *("x.to(x.device)", "torch.zeros(3, device=x.device) + i", "torch.nn.functional.one_hot(i, 3)", "x.topk(2)"),
    *("torch.quantile(x, 0.5)", "x.std(0).clamp(min=x.min())", "torch.fft.fft2(x).abs()", "x.argsort(1)"),
    *("x.repeat_interleave(2)", "torch.linalg.norm(x)", "torch.einsum('ij,kj->ik', x, x)", "x.detach().clone()"),
    *("torch.tensor(3.0).item()", "float(torch.rand(3).mean())", "torch.tensor([1.0, 2.0], device=x.device)"),
)


def found(code: str) -> list[str]:
    """What is noted of an expression in x [4, 3] and i [3], both on the device."""
    x, i = torch.linspace(-1, 2, 12).reshape(4, 3), torch.arange(3)
    x[2, 2] = 7
    with watched([x, i]) as reads:
        eval(code, {"x": x, "i": i, "torch": torch, "np": np, "math": math})
    return reads.found


@pytest.mark.parametrize("code", READING)
def test_calls_that_read_values(code):
    assert [re.sub(r".* at ", "", said) for said in found(code)] == ["<string>:1"]


@pytest.mark.parametrize("code", STAYING)
def test_calls_that_do_not(code):
    assert found(code) == []
