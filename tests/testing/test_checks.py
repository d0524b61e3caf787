"""The checks pass what is right, and name what is wrong: one deliberately wrong plugin for each mistake."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from attrs import define, field, frozen

from corefit import Condition, Objective, Reward, Sampler, Step, Supervised, Term
from corefit.errors import ConfigError, ModelError
from corefit.flow import clean, like, mix, noise_end, per_sample, raised
from corefit.samplers import Cps, DanceSde, FlowSde, Ode
from corefit.testing import ToyBackbone, check_backbone, check_objective, check_sampler, toy_batch, toy_context
from corefit.testing.toy import loaded
from corefit_backbones.sd3 import Sd3
from corefit_flow_grpo.advantage import advantages
from corefit_flow_grpo.objective import FlowGrpo
from corefit_sft import Sft
from corefit_soar import Soar

PROMPTS = ["a red sky", "a blue sea"]
GRPO = {"group": 4, "steps": 4}


def test_importing_the_kit_does_not_import_torch():
    code = "import corefit.testing, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# what is right


@pytest.mark.parametrize(
    "sampler",
    [Ode(), FlowSde(), FlowSde(0), FlowSde(1.2), DanceSde(), DanceSde(0), Cps(), Cps(0), Cps(1.0)],
    ids=repr,
)
def test_built_in_samplers_pass(sampler):
    check_sampler(sampler)


def test_a_documented_density_passes_when_told():
    check_sampler(Cps(density="published"), density=False)


@pytest.mark.parametrize(
    "objective",
    [
        Sft(),
        Sft(dropout=0.5),
        Soar(),
        Soar(chunk=4, dropout=0.3),
        Soar(points=2, paths=2, noise="fresh"),
        Soar(points=3, chunk=2, weight=2.0, normalize="weighted", levels="table"),
        Soar(weight=0),
        FlowGrpo(**GRPO),
        FlowGrpo(**GRPO, epochs=2, updates=2),
        FlowGrpo(**GRPO, beta=0.1, kl="published", std="group", zero_variance="keep"),
        FlowGrpo(group=2, steps=6, window=2, detach_unconditional=True),
    ],
    ids=lambda o: type(o).__name__,
)
def test_first_party_objectives_pass(objective):
    check_objective(objective)


@pytest.mark.parametrize("sampler", [Cps(), DanceSde()], ids=repr)
def test_flow_grpo_passes_with_other_samplers(sampler):
    check_objective(FlowGrpo(**GRPO), sampler=sampler)


def toy(shape=(4, 8, 8), kind=ToyBackbone):
    return loaded(kind(shape))


@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 4, 4), (1, 2, 2), (16, 3)], ids=str)
def test_the_toy_backbone_passes(shape):
    check_backbone(toy(shape), prompts=PROMPTS)


@pytest.mark.parametrize(("shape", "media"), [((3, 2, 4, 6), (2, 3, 2, 4, 6)), ((10, 4), (2, 3, 2, 5))], ids=str)
def test_the_toy_backbone_passes_with_media(shape, media):
    check_backbone(toy(shape), prompts=PROMPTS, media=torch.rand(media))


def test_a_tiny_sd3_passes(checkpoint):
    backbone = Sd3(str(checkpoint), max_sequence_length=16)
    backbone.load(torch.device("cpu"), torch.float32)
    before = [p.clone() for p in backbone.transformer.parameters()]
    check_backbone(backbone, prompts=PROMPTS)
    assert all(torch.equal(p, old) for p, old in zip(backbone.transformer.parameters(), before, strict=True))


# the toy itself


@pytest.mark.parametrize("shape", [(3, 4, 4), (16, 3), (3, 4, 2, 2), (48,)], ids=str)
def test_the_toys_velocity_is_the_same_in_any_layout(shape):
    flat, other = toy((48,)), toy(shape)
    x, sigma = torch.linspace(-2, 2, 96).reshape(2, 48), torch.tensor([0.3, 0.8])
    cond = flat.encode_text(PROMPTS)
    v = other.velocity(x.reshape(2, *shape), sigma, cond)
    torch.testing.assert_close(v.reshape(2, 48), flat.velocity(x, sigma, cond))


def test_the_toy_decodes_what_it_encodes():
    media = torch.rand(2, 3, 4, 4)
    for shape in ((3, 4, 4), (5, 4, 4), (16, 3)):
        torch.testing.assert_close(toy(shape).decode(toy(shape).encode(media)), media)


def test_the_toy_counts_calls_and_reuses_a_known_velocity():
    backbone = toy()
    batch = toy_batch(backbone, 2)
    x, sigma = batch.clean, torch.tensor([0.3, 0.8])
    v = backbone.velocity(x, sigma, batch.cond)
    assert backbone.calls == 1
    guided = backbone.guided(x, sigma, batch.cond, 2.0, v_cond=v)
    assert backbone.calls == 2
    torch.testing.assert_close(guided, 2 * v - backbone.velocity(x, sigma, backbone.null(2)))


def test_the_toy_is_a_function_of_its_seed():
    one, same, other = (loaded(ToyBackbone(seed=seed)) for seed in (0, 0, 1))
    batch = toy_batch(one, 2)
    v = [b.velocity(batch.clean, torch.tensor([0.3, 0.8]), batch.cond) for b in (one, same, other)]
    assert torch.equal(v[0], v[1])
    assert not torch.equal(v[0], v[2])
    assert one.weights_key() == same.weights_key() != other.weights_key()


def test_the_toy_says_what_it_cannot(tmp_path):
    with pytest.raises(ModelError, match="no LoRA"):
        toy().load_lora(tmp_path)
    with pytest.raises(ModelError, match=r"no toy\.safetensors"):
        ToyBackbone().moved(tmp_path).check()
    (tmp_path / "toy.safetensors").write_bytes(b"half")
    with pytest.raises(ModelError, match=r"toy\.safetensors: cannot be read"):
        loaded(ToyBackbone().moved(tmp_path))
    with pytest.raises(ConfigError, match=r"media of \[8, 8\]"):
        toy().latent_shape([16, 16])
    with pytest.raises(ConfigError, match="have media"):
        toy((5,)).latent_shape([1, 5])


def test_a_toy_batch_does_not_depend_on_its_size():
    whole, later = toy_batch(toy(), 8, group=2), toy_batch(toy(), 4, group=2, first=4)
    assert torch.equal(whole.clean[4:], later.clean)
    assert whole.prompts[4:] == later.prompts
    assert toy_batch(toy(), 2, media=False).x0 is None


def test_a_toy_context_draws_by_row():
    batch = toy_batch(toy(), 4)
    whole, part = toy_context(toy(), batch.rows), toy_context(toy(), batch.rows[2:])
    assert torch.equal(whole.randn_like(batch.clean)[2:], part.randn_like(batch.clean[2:]))
    assert not torch.equal(whole.rand(4), toy_context(toy(), batch.rows, seed=1).rand(4))


# objectives that are wrong


def matched(batch, ctx, noise=None):
    """noise, sigma and the velocity at the mix, as SFT has them."""
    x0 = batch.clean
    noise, sigma = ctx.randn_like(x0) if noise is None else noise, ctx.sigma(x0)
    return noise, sigma, ctx.backbone.velocity(mix(x0, noise, sigma), sigma, batch.cond)


def errors(batch, ctx, noise=None):
    """SFT's loss of each row, [B]."""
    noise, _, v = matched(batch, ctx, noise)
    return per_sample((v - (noise - batch.clean)) ** 2)


class Detached(Supervised):
    def terms(self, batch, ctx):
        noise, _, v = matched(batch, ctx)
        yield Term.of(per_sample((v.detach() - (noise - batch.clean)) ** 2))


class Unreached(Supervised):
    def terms(self, batch, ctx):
        yield Term.of(errors(batch, ctx) * 0)


class WrongSign(Supervised):
    def terms(self, batch, ctx):
        noise, _, v = matched(batch, ctx)
        yield Term.of(per_sample((v - (batch.clean - noise)) ** 2))


class Maximised(Supervised):
    def terms(self, batch, ctx):
        yield Term.of(-errors(batch, ctx))


class TimeReversed(Supervised):
    def terms(self, batch, ctx):
        x0 = batch.clean
        noise, sigma = ctx.randn_like(x0), ctx.sigma(x0)
        v = ctx.backbone.velocity(mix(noise, x0, sigma), sigma, batch.cond)
        yield Term.of(per_sample((v - (x0 - noise)) ** 2))


class TorchNoise(Supervised):
    def terms(self, batch, ctx):
        yield Term.of(errors(batch, ctx, torch.randn_like(batch.clean)))


class NumpyNoise(Supervised):
    def terms(self, batch, ctx):
        yield Term.of(errors(batch, ctx) * torch.tensor(np.random.rand(len(batch))).float())


class PythonNoise(Supervised):
    def terms(self, batch, ctx):
        yield Term.of(errors(batch, ctx) * random.random())


class OwnGenerator(Supervised):
    """The same noise on every rank."""

    def terms(self, batch, ctx):
        yield Term.of(errors(batch, ctx, torch.randn(batch.clean.shape, generator=torch.Generator().manual_seed(0))))


class NoNoise(Supervised):
    def terms(self, batch, ctx):
        x0, sigma = batch.clean, torch.full((len(batch),), 0.5)
        yield Term.of(per_sample((ctx.backbone.velocity(x0, sigma, batch.cond) + x0) ** 2))


class InPlace(Supervised):
    def terms(self, batch, ctx):
        loss = errors(batch, ctx)
        batch.clean.mul_(0.5)
        yield Term.of(loss)


class MetaInPlace(Supervised):
    def terms(self, batch, ctx):
        for meta in batch.meta:
            meta["seen"] = True
        yield Term.of(errors(batch, ctx))


class CondInPlace(Supervised):
    def terms(self, batch, ctx):
        batch.cond.tensors["code"].zero_()
        yield Term.of(errors(batch, ctx))


class CountOne(Supervised):
    def terms(self, batch, ctx):
        yield Term(errors(batch, ctx).sum(), 1.0)


class CountNegative(Supervised):
    def terms(self, batch, ctx):
        yield Term(errors(batch, ctx).sum(), -1.0)


class CountNone(Supervised):
    def terms(self, batch, ctx):
        yield Term(errors(batch, ctx).sum(), 0)


class Mean(Supervised):
    def terms(self, batch, ctx):
        yield Term(errors(batch, ctx).mean(), len(batch))


class TooFew(Supervised):
    num_terms = 3

    def terms(self, batch, ctx):
        yield Term.of(errors(batch, ctx))
        yield Term.of(errors(batch, ctx))


class TooMany(Supervised):
    def terms(self, batch, ctx):
        yield Term.of(errors(batch, ctx))
        yield Term.of(errors(batch, ctx))


class TooManyParts(Supervised):
    def experience(self, batch, ctx):
        yield batch
        yield batch

    def terms(self, batch, ctx):
        yield Term.of(errors(batch, ctx))


class TooFewParts(TooManyParts):
    num_updates = 3


class Neighbours(Supervised):
    def terms(self, batch, ctx):
        loss = errors(batch, ctx)
        yield Term.of(loss / loss.mean().detach())


class ImagesOnly(Supervised):
    def terms(self, batch, ctx):
        x0 = batch.clean
        noise, sigma = ctx.randn_like(x0), ctx.sigma(x0)
        s = sigma.view(-1, 1, 1, 1)
        v = ctx.backbone.velocity((1 - s) * x0 + s * noise, sigma, batch.cond)
        yield Term.of(per_sample((v - (noise - x0)) ** 2))


class ByAxis(Supervised):
    def terms(self, batch, ctx):
        noise, _, v = matched(batch, ctx)
        yield Term.of((v - (noise - batch.clean)).square().mean(1).flatten(1).sum(1))


class Double(Supervised):
    def terms(self, batch, ctx):
        yield Term.of(errors(batch, ctx).double())


class Vector(Supervised):
    def terms(self, batch, ctx):
        yield Term(errors(batch, ctx), len(batch))


class NotFinite(Supervised):
    def terms(self, batch, ctx):
        yield Term.of((errors(batch, ctx) - 1e6).log())


class SharedGraph(Supervised):
    num_terms = 2

    def terms(self, batch, ctx):
        loss = errors(batch, ctx)
        yield Term.of(loss)
        yield Term.of(loss**2)


class MetricWithGraph(Supervised):
    def terms(self, batch, ctx):
        loss = errors(batch, ctx)
        yield Term(loss.sum(), len(loss), {"loss": loss})


class Undeclared(Supervised):
    def terms(self, batch, ctx):
        loss = errors(batch, ctx)
        yield Term.of(loss * ctx.sampler.stochastic)


class NoMedia(Supervised):
    uses = frozenset({"noise"})

    def terms(self, batch, ctx):
        yield Term.of(errors(batch, ctx))


class Misspelt(NoMedia):
    uses = frozenset({"medium"})


WRONG_OBJECTIVES = [
    (Detached, "no graph, so the gradient does not reach the model"),
    (Unreached, "gradient of part 0 is 0"),
    (WrongSign, r"velocity is noise - x0.* check the sign"),
    (Maximised, "check the sign of the target and of the total, which is minimised"),
    (TimeReversed, r"x = \(1 - sigma\) x0 \+ sigma noise"),
    (TorchNoise, "another seed of torch, numpy or random"),
    (NumpyNoise, "another seed of torch, numpy or random"),
    (PythonNoise, "another seed of torch, numpy or random"),
    (OwnGenerator, "noise is drawn with ctx, a row at a time"),
    (NoNoise, "the next step's key gives the same loss"),
    (InPlace, r"batch\.x0 is changed in place"),
    (MetaInPlace, r"batch\.meta is changed in place"),
    (CondInPlace, r"batch\.cond is changed in place"),
    (CountOne, "count is not the number of items.*counts 1 and 2"),
    (CountNegative, r"count is -1\.0"),
    (CountNone, "count is 0 in part 0"),
    (Mean, "`total` is a sum, not a mean"),
    (TooFew, "yields 2 terms, but num_terms is 3"),
    (TooMany, "yields more terms than num_terms = 1"),
    (TooManyParts, "more than num_updates = 1 parts"),
    (TooFewParts, "yields 2 parts, but num_updates is 3"),
    (Neighbours, "must not depend on its neighbours"),
    (ImagesOnly, r"packed tokens \[B, L, C\]"),
    (ByAxis, "the same numbers as packed tokens .* give other losses"),
    (Double, r"total is torch\.float64"),
    (Vector, r"total has shape \[8\]; it is a scalar"),
    (NotFinite, "total is nan"),
    (SharedGraph, "backward on term 1 fails.*must not share a graph"),
    (MetricWithGraph, "metric 'loss' is detached values .* with a graph"),
    (Undeclared, r"reads ctx\.sampler \(stochastic\), but `uses` does not name 'sampler'"),
    (NoMedia, "must say so in `uses`"),
    (Misspelt, r"`uses` names \['medium'\]"),
]


@pytest.mark.parametrize(("cls", "problem"), WRONG_OBJECTIVES, ids=lambda each: getattr(each, "__name__", ""))
def test_a_wrong_objective_is_named(cls, problem):
    with pytest.raises(AssertionError, match=f"^{cls.__name__}: .*{problem}"):
        check_objective(cls())


def test_one_shape_alone_is_not_compared():
    check_objective(ByAxis(), shape=(3, 4, 4))
    check_objective(ImagesOnly(), shape=(2, 3, 5))


def test_an_objective_that_teaches_something_else_passes_when_told():
    check_objective(WrongSign(), learns=False)


@frozen
class HalfConstant(Reward):
    """No variance in groups of even number: these rows are left out."""

    def score(self, media, prompts, meta):
        odd = torch.tensor([int(prompt.split()[-1]) % 2 for prompt in prompts])
        return media.flatten(1).mean(1) * odd


@frozen
class OneGroup(Reward):
    """Variance in the first group alone: one of two ranks has no informative row."""

    def score(self, media, prompts, meta):
        return media.flatten(1).mean(1) * torch.tensor([prompt == "prompt 0" for prompt in prompts])


@pytest.mark.parametrize("reward", [HalfConstant(), OneGroup()], ids=repr)
def test_flow_grpo_passes_where_groups_carry_no_information(reward):
    check_objective(FlowGrpo(**GRPO), reward=reward)
    check_objective(FlowGrpo(**GRPO, updates=2), reward=reward)


@frozen
class OwnStatistics(FlowGrpo):
    """Divides by the standard deviation of its own rank's rewards."""

    def _advantages(self, reward, rows, ctx):
        return advantages(reward, self.group, global_std=True)


@frozen
class OwnLength(FlowGrpo):
    """Drops rows without telling the other ranks."""

    @staticmethod
    def _informative(index, informative, ctx):
        return [i for i in index if informative[i]] or index[:1]


@frozen
class Uneven(FlowGrpo):
    """Asks the others on the rank of row 0 alone."""

    def _advantages(self, reward, rows, ctx):
        every = ctx.gather(reward) if rows[0] == 0 else reward
        return advantages(every, self.group, global_std=False)[: len(rows)]


@pytest.mark.parametrize(
    ("cls", "problem"),
    [
        (OwnStatistics, "one batch and 2 ranks of it give other sums"),
        (OwnLength, r"two ranks get parts of \[4\] and \[1\] rows"),
        (Uneven, "ranks gather tensors of shapes|one rank calls ctx.gather more often"),
    ],
)
def test_an_objective_that_ranks_would_disagree_on_is_named(cls, problem):
    with pytest.raises(AssertionError, match=problem):
        check_objective(cls(**GRPO), reward=OneGroup() if cls is OwnLength else None)


class Parts(Objective):
    """An objective that rolls out nothing and reads no noise: no false alarm for one that never draws."""

    uses = frozenset({"media"})
    num_terms = 1

    def experience(self, batch, ctx):
        yield batch

    def terms(self, part, ctx):
        sigma = torch.full((len(part),), 0.5)
        yield Term.of(per_sample((ctx.backbone.velocity(part.clean, sigma, part.cond) + part.clean) ** 2))


def test_an_objective_that_never_draws_passes():
    check_objective(Parts())


# samplers that are wrong


def euler(x, v, sigma, sigma_next):
    return raised(x) + like(sigma_next - sigma, x) * raised(v)


class Deterministic(Sampler):
    """An Ode to spoil."""

    stochastic = False

    def step(self, x, v, sigma, sigma_next):
        return Step(euler(x, v, sigma, sigma_next), 0 * sigma)


class Stochastic(Sampler):
    """Cps to spoil: half of the noise variance is drawn anew."""

    def step(self, x, v, sigma, sigma_next):
        x, v = raised(x), raised(v)
        std = sigma_next * 0.5**0.5
        return Step(like(1 - sigma_next, x) * clean(x, v, sigma) + like(std, x) * noise_end(x, v, sigma), std)


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
        return Step(raised(x) + 1.5 * like(sigma_next - sigma, x) * raised(v), 0 * sigma)


class Curved(Deterministic):
    def step(self, x, v, sigma, sigma_next):
        dt = sigma_next - sigma
        return Step(euler(x, v, sigma, sigma_next) + like(dt**2, x) * raised(v), 0 * sigma)


class NoConstant(Stochastic):
    def log_prob(self, x_next, step):
        return super().log_prob(x_next, step) + 1


class Summed(Stochastic):
    def log_prob(self, x_next, step):
        return super().log_prob(x_next, step) * x_next[0].numel()


class PerElement(Stochastic):
    def log_prob(self, x_next, step):
        std = like(step.std, x_next)
        return -((x_next - step.mean) ** 2) / (2 * std**2) - std.log() - 0.918939


class NoGradient(Stochastic):
    def step(self, x, v, sigma, sigma_next):
        return super().step(x, v.detach(), sigma, sigma_next)


class Halves(Deterministic):
    def step(self, x, v, sigma, sigma_next):
        dt = like(sigma_next - sigma, x)
        return Step(x + dt.to(x.dtype) * v, 0 * sigma)


class Singles(Deterministic):
    def step(self, x, v, sigma, sigma_next):
        return Step(euler(x.float(), v.float(), sigma.float(), sigma_next.float()), 0 * sigma)


class ImageSampler(Deterministic):
    def step(self, x, v, sigma, sigma_next):
        dt = (sigma_next - sigma).view(-1, *(1,) * (max(x.ndim, 4) - 1))
        return Step(
            (raised(x) + dt * raised(v)).reshape(x.shape) if x.ndim > 2 else euler(x, v, sigma, sigma_next), 0 * sigma
        )


class FirstRowsTime(Deterministic):
    def step(self, x, v, sigma, sigma_next):
        return Step(raised(x) + (sigma_next - sigma)[0] * raised(v), 0 * sigma)


class Drawing(Stochastic):
    def step(self, x, v, sigma, sigma_next):
        step = super().step(x, v, sigma, sigma_next)
        return Step(step.mean + like(step.std, x) * torch.randn(x.shape), step.std)


class Spoiling(Deterministic):
    def step(self, x, v, sigma, sigma_next):
        return Step(x.add_(like(sigma_next - sigma, x) * v), 0 * sigma)


class WideStd(Stochastic):
    def step(self, x, v, sigma, sigma_next):
        step = super().step(x, v, sigma, sigma_next)
        return Step(step.mean, like(step.std, x))


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
def test_the_samplers_that_were_spoilt_are_right(cls):
    check_sampler(cls())


def test_a_sampler_without_the_marginals_passes_when_told():
    check_sampler(NoScore(), marginals=False)


# backbones that are wrong


class GuidanceOffByOne(ToyBackbone):
    def guided(self, x, sigma, cond, scale, v_cond=None):
        return super().guided(x, sigma, cond, scale + 1, v_cond)


class ForgetsKnown(ToyBackbone):
    def guided(self, x, sigma, cond, scale, v_cond=None):
        return super().guided(x, sigma, cond, scale, None if v_cond is None else 0 * v_cond)


class NoFinalZero(ToyBackbone):
    def sigmas(self, steps, shape):
        return super().sigmas(steps + 1, shape)[:-1]


class Rising(ToyBackbone):
    def sigmas(self, steps, shape):
        grid = super().sigmas(steps, shape)
        return torch.cat([grid[:1], grid[1:-1].flip(0), grid[-1:]])


class Timesteps(ToyBackbone):
    def sigmas(self, steps, shape):
        return 1000 * super().sigmas(steps, shape)


class OneTooFew(ToyBackbone):
    def sigmas(self, steps, shape):
        return super().sigmas(steps - 1, shape)


class WrongNull(ToyBackbone):
    def null(self, n):
        return Condition({"code": torch.ones(n, 1)})


class OneNull(ToyBackbone):
    def null(self, n):
        return super().null(1)


class HalfVelocity(ToyBackbone):
    def velocity(self, x, sigma, cond):
        return super().velocity(x, sigma, cond).half()


class Cropped(ToyBackbone):
    def velocity(self, x, sigma, cond):
        return super().velocity(x, sigma, cond)[..., :-1]


class MixedRows(ToyBackbone):
    def velocity(self, x, sigma, cond):
        return super().velocity(x - x.mean(0), sigma, cond)


class NoSigma(ToyBackbone):
    def velocity(self, x, sigma, cond):
        return super().velocity(x, 0 * sigma, cond)


class NoCondition(ToyBackbone):
    def velocity(self, x, sigma, cond):
        return super().velocity(x, sigma, self.null(len(x)))


class NoGraph(ToyBackbone):
    def velocity(self, x, sigma, cond):
        return super().velocity(x, sigma, cond).detach()


class NotBounded(ToyBackbone):
    def decode(self, x0):
        return 2 * super().decode(x0)


class OtherShape(ToyBackbone):
    def latent_shape(self, size):
        return (4, *size, 1)[:3] if size[0] != 8 else (4, 4, 4)


class DoubleLatents(ToyBackbone):
    def encode(self, media):
        return super().encode(media).double()


class PaddedToLongest(ToyBackbone):
    def encode_text(self, prompts):
        return Condition({"code": super().encode_text(prompts).tensors["code"] + max(map(len, prompts))})


class SavesTheOld(ToyBackbone):
    def save(self, folder):
        loaded(ToyBackbone(self.shape)).save(folder)


class ForgetsItsFolder(ToyBackbone):
    def moved(self, folder):
        return type(self)(self.shape)


class ConstantKey(ToyBackbone):
    def weights_key(self):
        return "toy"


@define(eq=False, slots=False)
class NeedsEncoders(ToyBackbone):
    gone: bool = field(init=False, default=False)

    def release(self):
        self.gone = True

    def null(self, n):
        if self.gone:
            raise RuntimeError("no text encoder")
        return super().null(n)


WRONG_BACKBONES = [
    (GuidanceOffByOne, "guided with scale 1 is not velocity .they differ by up to"),
    (ForgetsKnown, "guided with v_cond"),
    (NoFinalZero, "not at 0: append the 0"),
    (Rising, "does not fall strictly"),
    (Timesteps, r"starts at 1000; pure noise is sigma 1"),
    (OneTooFew, r"sigmas\(2\) is \[2\]"),
    (WrongNull, r'null\(1\) is not encode_text\(\[""\]\)'),
    (OneNull, r"null\(3\) has 1 rows"),
    (HalfVelocity, "velocity is torch.float16; return float32"),
    (Cropped, "the shape stays"),
    (MixedRows, "a row alone differs"),
    (NoSigma, "does not depend on sigma"),
    (NoCondition, "velocity ignores cond"),
    (NoGraph, "velocity has no graph"),
    (NotBounded, r"media are in \[0, 1\]"),
    (OtherShape, "latent_shape says"),
    (DoubleLatents, r"encode\(media\) is torch.float64"),
    (PaddedToLongest, "alone differs from its row among others"),
    (SavesTheOld, "not that of the weights when they were saved"),
    (ForgetsItsFolder, "not that of the weights when they were saved"),
    (ConstantKey, "must be a hash"),
    (NeedsEncoders, "null fails after release"),
]


@pytest.mark.parametrize(("cls", "problem"), WRONG_BACKBONES, ids=lambda each: getattr(each, "__name__", ""))
def test_a_wrong_backbone_is_named(cls, problem):
    with pytest.raises(AssertionError, match=f"^{cls.__name__}: .*{problem}"):
        check_backbone(toy(kind=cls), prompts=PROMPTS, media=torch.rand(2, 3, 8, 8))


def test_what_check_backbone_needs():
    with pytest.raises(AssertionError, match="load the backbone first"):
        check_backbone(ToyBackbone(), prompts=PROMPTS)
    with pytest.raises(AssertionError, match="two different prompts"):
        check_backbone(toy(), prompts=["a", "a"])
    with pytest.raises(AssertionError, match="pass media"):
        check_backbone(toy((3, 2, 4, 4)), prompts=PROMPTS)
