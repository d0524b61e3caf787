"""SOAR against the vectors of HY-SOAR's own code, and what its geometry and its terms promise.

Not implemented, deliberately: the rollout modes `simple` (its state is noisier than its label) and `sde` (it ignores
its noise level), so their vectors in soar_rollout_step have nothing of ours to be compared with.
"""

import math
from weakref import WeakSet

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import DTYPES, Analytic, Draws, Given, batch_of, golden

from corefit import Condition, Context
from corefit.flow import denoised, expand_like, interpolate, per_sample, shifted, unshifted
from corefit.rng import Rng
from corefit.rollout.noise import CosMap, LogitNormal, Mode, SigmaSqrt, Uniform
from corefit.rollout.samplers import Cps, FlowSde, Ode
from corefit_sft import Sft
from corefit_soar import Soar, table
from corefit_soar.geometry import deviation, gain, next_level, next_time, renoised

SHIFT = 3.0
WEIGHTINGS = {
    "logit_normal": LogitNormal(),
    "sigma_sqrt": SigmaSqrt(),
    "cosmap": CosMap(),
    "mode": Mode(),
    "none": Uniform(),
}
NO_BOUND = 1e9
PATHS = {"soar_aux_points_p1_cps": None, "soar_aux_points_p3_cps": Cps, "soar_aux_points_p3_flow_sde": FlowSde}


# ---- the published code's tables


@pytest.mark.parametrize("shift", [3.0, 1.0])
def test_training_table(shift):
    vectors = golden("schedules")
    sigmas = table.table(shift, torch.zeros(1))
    vectors.check(f"train.shift{shift}.sigmas", sigmas)
    vectors.check(f"train.shift{shift}.timesteps", sigmas * 1000)
    assert torch.equal(sigmas, vectors[f"train.shift{shift}.sigmas"])  # closer than its tolerance: it is looked up in


def test_look_up_of_a_time():
    vectors = golden("schedules")
    sigma = table.sigma_at(vectors["lookup.t"], vectors.meta["lookup_shift"])
    vectors.check("lookup.sigma", sigma)
    vectors.check("lookup.timestep", sigma * 1000)


def test_time_of_a_sigma_and_what_the_model_is_told():
    vectors = golden("schedules")
    sigma, shift = vectors["inv.sigma"], vectors.meta["lookup_shift"]
    vectors.check("inv.t", table.time_of(sigma, shift))
    vectors.check("inv.timestep", table.model_sigma(sigma, shift) * 1000)
    vectors.check("inv.timestep_continuous", sigma.double() * 1000)


def test_float32_sends_165_of_1000_entries_to_their_neighbour():
    """math.md (b) 2: so telling a table sigma a second time moves it."""
    entries = table.table(SHIFT, torch.zeros(1))
    moved = table.model_sigma(entries, SHIFT) != entries
    assert int(moved.sum()) == 165
    assert torch.equal(table.model_sigma(entries, SHIFT)[moved], entries[moved.nonzero().flatten() - 1])


def test_table_levels_are_the_published_ones():
    """From time t0, the base state is at entry trunc((1 - t0) 1000), and s* at that of max(t0 - 1/K, 0)."""
    vectors = golden("soar_aux_points_p1_cps")
    soar, model = Soar(levels="table", points=1, steps=vectors.meta["K"], max_gain=NO_BOUND), Analytic()
    at = Given(shifted(vectors["t0"], SHIFT))
    draws = Draws(normal=[vectors["z_1"]], uniform=[torch.zeros(4)])  # fraction 0: the point lies at s* itself
    ctx = Context(model, Ode(), at, draws)
    list(soar.terms(batch_of(vectors["z_0"], vectors["cond"]), ctx))
    base, _, point = model.asked
    vectors.check("sigma_t0", base)
    # the model is told s* through the look-up, as published
    assert torch.equal(point, table.model_sigma(vectors["sigma_t1"], SHIFT))


# ---- the rollout step and the correction points


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("scale", [0.5, 0.7])
@pytest.mark.parametrize(("mode", "sampler"), [("cps", Cps), ("flow_sde", FlowSde)])
def test_rollout_step_is_the_published_one(mode, sampler, scale, precision):
    """Its flow_sde takes the training table's second entry for sigma = 1 only, which does not occur here."""
    vectors = golden("soar_rollout_step")
    x, v, noise, s, s_star = (
        vectors[name].to(DTYPES[precision]) for name in ("sample", "velocity", "noise", "sigma_curr", "sigma_next")
    )
    assert float(s.max()) < 1
    step = sampler(scale).step(x, v, s, s_star)
    vectors.check(f"{mode}.a{scale}.{precision}", step.mean + expand_like(step.std, x) * noise)


def points_of(vectors):
    """(number, path, fractions) of each of a file's points."""
    for path in range(vectors.meta["num_paths"]):
        for i, fractions in enumerate(vectors[f"rand_frac.path{path}"]):
            yield path * vectors.meta["N"] + i, path, fractions


def deltas(vectors, sampler, z, v, dtype):
    """Delta of each path, from the rollout velocity v at z."""
    z0, eps, s, s_star = (vectors[name].to(dtype) for name in ("z_0", "z_1", "sigma_t0", "sigma_t1"))
    yield deviation(v, z0, eps, s, s_star)
    for path in range(1, vectors.meta["num_paths"]):
        step = sampler(vectors.meta["scale"]).step(z, v, s, s_star)
        noise = vectors[f"path_noise.path{path}"].to(dtype)
        yield step.mean + expand_like(step.std, z) * noise - interpolate(z0, eps, s_star)


@pytest.mark.parametrize(("file", "sampler"), PATHS.items())
def test_rollout_is_the_published_one(file, sampler):
    vectors = golden(file)
    sigma, steps = vectors["sigma_t0"], vectors.meta["K"]
    vectors.check("sigma_t0", table.sigma_at(vectors["t0"], SHIFT))
    vectors.check("timestep_t0", table.sigma_at(vectors["t0"], SHIFT) * 1000)
    t1 = (vectors["t0"] - 1 / steps).clamp(min=0)
    vectors.check("t1", next_time(shifted(vectors["t0"], SHIFT), SHIFT, steps))
    vectors.check("sigma_t1", table.sigma_at(t1, SHIFT))
    vectors.check("active", (t1 > 0).to(torch.uint8))
    z = interpolate(vectors["z_0"], vectors["z_1"], sigma)
    vectors.check("z_t0", z)
    model = Analytic(torch.tensor([vectors.meta[name] for name in "abk"]))
    v = model.guided(z, sigma, Condition({"c": vectors["cond"]}), vectors.meta["cfg"])
    vectors.check("v_cfg", v)


@pytest.mark.parametrize(("file", "sampler"), PATHS.items())
def test_correction_points_are_the_published_ones(file, sampler):
    """Levels, the table timesteps that the model is told, and states; inactive rows of stochastic paths left out."""
    vectors = golden(file)
    z0, eps, s_star = vectors["z_0"], vectors["z_1"], vectors["sigma_t1"]
    paths = list(deltas(vectors, sampler, vectors["z_t0"], vectors["v_cfg"], torch.float32))
    vectors.check("num_points", torch.tensor([len(list(points_of(vectors)))]))
    for number, path, fractions in points_of(vectors):
        rows = vectors["active"].nonzero().flatten() if path else torch.arange(4)
        level = s_star + fractions * (1 - s_star)
        z, _ = renoised(z0, eps, paths[path], s_star, level)
        vectors.check(f"point{number}.sample_indices", rows)
        vectors.check(f"point{number}.sigmas", level[rows])
        vectors.check(f"point{number}.timesteps", (table.model_sigma(level, SHIFT) * 1000)[rows])
        vectors.check(f"point{number}.latents", z[rows])


def test_states_in_float64():
    """The oracle's inputs are the published float32 z_t0, v_cfg and sigma'."""
    vectors = golden("soar_aux_points_p1_cps")
    z0, eps, s, s_star, z, v = (
        vectors[name].double() for name in ("z_0", "z_1", "sigma_t0", "sigma_t1", "z_t0", "v_cfg")
    )
    end = Ode().step(z, v, s, s_star).mean
    vectors.check("z_tilde.f64", end)
    for number, _, _ in points_of(vectors):
        state, _ = renoised(
            z0, eps, end - interpolate(z0, eps, s_star), s_star, vectors[f"point{number}.sigmas"].double()
        )
        vectors.check(f"point{number}.latents.f64", state)


@pytest.mark.parametrize("file", PATHS)
def test_target_of_each_published_state(file):
    """v_corr.f64 is (z' - z0) / sigma' of the float32 state; ours is written without that cancellation.

    So Delta is what leads to that very state, and the target must come out.
    """
    vectors = golden(file)
    for number, _, _ in points_of(vectors):
        rows = vectors[f"point{number}.sample_indices"]
        z0, eps, s_star = (vectors[name].double()[rows] for name in ("z_0", "z_1", "sigma_t1"))
        state, level = vectors[f"point{number}.latents"].double(), vectors[f"point{number}.sigmas"].double()
        delta = (state - interpolate(z0, eps, level)) * expand_like((1 - s_star) / (1 - level), state)
        _, target = renoised(z0, eps, delta, s_star, level)
        vectors.check(f"point{number}.v_corr.f64", target)


# ---- the loss, end to end


def run(vectors, weighting, dtype, sigma, **keys):
    """(losses of the terms, total, count, gradient) of Soar on a loss file's batch, draws and levels.

    Levels are float32 in both precisions, as in the files: "the f64 run on float32 inputs".
    """
    meta = vectors.meta
    params = vectors["params"].to(dtype, copy=True).requires_grad_()
    paths = range(meta["num_paths"])
    draws = Draws(
        normal=[vectors[name].to(dtype) for name in ("z_1", *(f"path_noise.path{p}" for p in paths[1:]))],
        uniform=[u for p in paths for u in vectors[f"rand_frac.path{p}"]],
    )
    ctx = Context(Analytic(params), Cps(meta["scale"]), Given(sigma, WEIGHTINGS[weighting]), draws)
    sizes = {"points": meta["N"], "paths": len(paths), "guidance": meta["cfg"], "steps": meta["K"]}
    losses, total, count = [], 0.0, 0.0
    batch = batch_of(vectors["z_0"].to(dtype), vectors["cond"].to(dtype))
    for term in Soar(**sizes, max_gain=NO_BOUND, **keys).terms(batch, ctx):
        term.total.backward()
        losses.append(term.metrics["loss"])
        total, count = total + term.total.detach(), count + term.count
    assert draws.spent
    return losses, total, count, params.grad


def check_loss(vectors, weighting, timesteps, precision, sigma):
    """Base and correction losses sample by sample, totals in both normalisations, and the gradient."""
    name, dtype = f"{weighting}.{timesteps}.{precision}", DTYPES[precision]
    for weight in vectors.meta["lambdas"]:
        for normalize, suffix in (("weighted", "code"), ("items", "items")):
            keys = {"levels": timesteps, "weight": weight, "normalize": normalize}
            losses, total, count, grad = run(vectors, weighting, dtype, sigma, **keys)
            aux = [loss[vectors[f"point{i}.sample_indices"]] for i, loss in enumerate(losses[1:])]
            vectors.check(f"{name}.main_per_sample", losses[0])
            vectors.check(f"{name}.aux_per_sample", torch.cat(aux))
            vectors.check(f"{name}.lam{weight}.total_{suffix}", total / count)
            if suffix == "code":
                vectors.check(f"{name}.lam{weight}.grad_code", grad / count)
            assert float(count) == 4 + vectors.meta["N_aux"] * (weight if suffix == "code" else 1)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("file", ["soar_loss_p1_cps", "soar_loss_p3_cps"])
def test_loss_of_the_published_code(file, precision):
    """levels = "table" with nothing but the times t0 given, as a run draws them."""
    vectors = golden(file)
    for weighting in WEIGHTINGS:
        check_loss(vectors, weighting, "table", precision, shifted(vectors["t0"], SHIFT))


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("file", ["soar_loss_p1_cps", "soar_loss_p3_cps"])
def test_loss_with_continuous_timesteps(file, weighting, precision, monkeypatch):
    """The file's "continuous" tells the model sigma' itself, but its rollout still runs between table levels.

    Ours has an exact s* there, so the table's is put in its place: all else is the objective's own.
    """
    s_star = golden("soar_aux_points_p1_cps")["sigma_t1"]
    monkeypatch.setattr("corefit_soar.objective.next_level", lambda *_: s_star)
    vectors = golden(file)
    check_loss(vectors, weighting, "continuous", precision, vectors["sigma_t0"])


# ---- geometry


@pytest.fixture(params=[(3, 4, 4), (5, 4), (2, 3, 2, 2)], ids=["image", "tokens", "video"])
def place(request):
    """z0, eps, v, s, s*, s' of six samples, in float64."""
    torch.manual_seed(0)
    z0, eps, v = torch.randn(3, 6, *request.param).double()
    s = torch.tensor([0.02, 0.2, 0.5, 0.8, 0.95, 1.0]).double()
    s_star = next_level(s, SHIFT, 40, 0.003)
    return z0, eps, v, s, s_star, s_star + torch.rand(6).double() * (1 - s_star)


def test_an_exact_rollout_leaves_the_ordinary_target(place):
    z0, eps, _, s, s_star, level = place
    delta = deviation(eps - z0, z0, eps, s, s_star)
    assert torch.equal(delta, torch.zeros_like(z0))
    z, target = renoised(z0, eps, delta, s_star, level)
    assert torch.equal(target, eps - z0)
    torch.testing.assert_close(z, interpolate(z0, eps, level))


def test_at_level_1_any_rollout_is_forgotten(place):
    z0, eps, v, s, s_star, _ = place
    z, target = renoised(z0, eps, deviation(v, z0, eps, s, s_star), s_star, torch.ones_like(s))
    torch.testing.assert_close(z, eps)
    torch.testing.assert_close(target, eps - z0)


def test_the_target_leads_back_to_the_data(place):
    z0, eps, v, s, s_star, level = place
    z, target = renoised(z0, eps, deviation(v, z0, eps, s, s_star), s_star, level)
    torch.testing.assert_close(denoised(z, target, level), z0)


def test_at_the_rollouts_end_the_state_is_the_rollouts(place):
    z0, eps, v, s, s_star, _ = place
    end = Ode().step(interpolate(z0, eps, s), v, s, s_star).mean
    z, _ = renoised(z0, eps, deviation(v, z0, eps, s, s_star), s_star, s_star)
    torch.testing.assert_close(z, end)


@pytest.mark.parametrize("fresh", [False, True])
def test_states_are_those_of_the_paper(place, fresh):
    """z' = (1 - alpha) z~ + alpha noise, v_corr = (z' - z0) / s', alpha = (s' - s*) / (1 - s*)."""
    z0, eps, v, s, s_star, level = place
    noise = torch.randn_like(eps) if fresh else eps
    alpha = expand_like((level - s_star) / (1 - s_star), z0)
    end = Ode().step(interpolate(z0, eps, s), v, s, s_star).mean
    z, target = renoised(z0, eps, end - interpolate(z0, eps, s_star), s_star, level, noise if fresh else None)
    torch.testing.assert_close(z, (1 - alpha) * end + alpha * noise)
    torch.testing.assert_close(target, (z - z0) / expand_like(level, z0))


def test_gain_is_how_much_an_error_grows(place):
    z0, eps, v, s, s_star, level = place
    _, target = renoised(z0, eps, deviation(v, z0, eps, s, s_star), s_star, level)
    grown = per_sample((target - (eps - z0)).abs()) / per_sample((v - (eps - z0)).abs())
    torch.testing.assert_close(grown, gain(s, s_star, level))


@given(st.floats(1e-6, 1), st.sampled_from([1.0, 3.0, 0.5]), st.integers(2, 100), st.floats(1e-4, 0.1))
def test_the_next_level_is_a_step_below(sigma, shift, steps, floor):
    s = torch.tensor([sigma], dtype=torch.float64)
    lower = next_level(s, shift, steps, floor)
    assert lower <= s
    assert lower >= min(sigma, floor)
    if lower > floor and lower < s:
        assert float(unshifted(s, shift) - unshifted(lower, shift)) == pytest.approx(1 / steps, abs=1e-9)


def test_float32_targets_survive_small_levels():
    """math.md (b) 8: (z' - z0) / s' costs 23 % at 0.01 in bf16; ours keeps float32's digits even at the floor."""
    torch.manual_seed(0)
    z0, eps, v = torch.randn(3, 4, 64)
    s, s_star, level = torch.full((4,), 0.01), torch.full((4,), 0.003), torch.full((4,), 0.0035)
    _, target = renoised(z0, eps, deviation(v, z0, eps, s, s_star), s_star, level)
    double = [t.double() for t in (z0, eps, v, s, s_star, level)]
    _, exact = renoised(*double[:2], deviation(double[2], *double[:2], *double[3:5]), *double[4:])
    assert float((target - exact).abs().max()) < 1e-5


# ---- the objective


def context(backbone, rows=4, **keys):
    defaults = {"sampler": Cps(0.5), "noise": LogitNormal(), "rng": Rng(("test",), range(rows))}
    return Context(backbone, **{**defaults, **keys})


def some(rows=4, shape=(2, 6, 6)):
    torch.manual_seed(0)
    return batch_of(torch.randn(rows, *shape), torch.linspace(-1, 1, rows))


def model():
    return Analytic(torch.tensor([0.7, -0.4, 0.3], requires_grad=True))


def gradient(soar, batch, together=False, **keys):
    """(total, count, gradient): a backward for each term, or one over their sum."""
    backbone = model()
    terms = [] if together else None
    total = count = 0.0
    for term in soar.terms(batch, context(backbone, len(batch), **keys)):
        total, count = total + term.total.detach(), count + term.count
        if together:
            terms.append(term)
        else:
            term.total.backward()
    if together:
        sum(t.total for t in terms).backward()
    return total, count, backbone.params.grad


@pytest.mark.parametrize(
    "soar", [Soar(), Soar(paths=3, noise="fresh", dropout=0.5, levels="table")], ids=["plain", "all"]
)
@pytest.mark.parametrize(
    "shape", [(36, 2), (2, 2, 3, 6), (4, 3, 6)], ids=["tokens", "video", "as many channels as rows"]
)
def test_any_layout_of_the_same_numbers_gives_the_same_loss(soar, shape):
    batch = some()
    other = batch_of(batch.x0.reshape(4, *shape), batch.cond.tensors["c"])
    image, reshaped = (gradient(soar, b) for b in (batch, other))
    assert torch.equal(image[0], reshaped[0])
    torch.testing.assert_close(image[2], reshaped[2], rtol=1e-6, atol=0)


CONFIGURATIONS = [
    Soar(),
    Soar(points=4, chunk=3, weight=0.5),
    Soar(paths=3, noise="fresh"),
    Soar(paths=2, normalize="weighted", weight=2.0, dropout=0.5),
    Soar(levels="table", guidance=1.0),
]


@pytest.mark.parametrize("soar", CONFIGURATIONS, ids=str)
def test_backward_term_by_term_is_backward_of_the_sum(soar):
    each, together = gradient(soar, some()), gradient(soar, some(), together=True)
    assert each[:2] == together[:2]
    torch.testing.assert_close(each[2], together[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("chunk", [2, 3, 4, 6, 10])
@pytest.mark.parametrize("paths", [1, 3])
def test_chunks_do_not_change_the_gradient(chunk, paths):
    one, many = (gradient(Soar(paths=paths, chunk=size), some(), noise=Uniform()) for size in (1, chunk))
    assert one[1] == many[1]
    torch.testing.assert_close(one[0], many[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(one[2], many[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("paths", [1, 3])
def test_each_point_of_a_chunk_has_its_own_bound(paths):
    """A bound this low is below every gain, so that each item's weight depends on its own s, s* and s'."""
    one, many = (
        gradient(Soar(paths=paths, points=4, chunk=size, max_gain=1e-3), some(), noise=Uniform()) for size in (1, 4)
    )
    torch.testing.assert_close(one[0], many[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(one[2], many[2], rtol=1e-5, atol=0)


@pytest.mark.parametrize("cut", [1, 3])
def test_micro_batches_add_up(cut):
    batch, soar, whole = some(), Soar(paths=2, dropout=0.4), gradient(Soar(paths=2, dropout=0.4), some())
    backbone, count = model(), 0.0
    for rows in (slice(0, cut), slice(cut, 4)):
        ctx = context(backbone)
        for term in soar.terms(batch[rows], ctx.at(ctx.rng[rows])):
            term.total.backward()
            count += term.count
    assert count == whole[1]
    torch.testing.assert_close(backbone.params.grad, whole[2], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("noise", [LogitNormal(), CosMap()], ids=str)
def test_weight_0_is_sft(dropout, noise):
    soar, sft = (
        gradient(kind, some(), noise=noise) for kind in (Soar(weight=0, dropout=dropout), Sft(dropout=dropout))
    )
    assert torch.equal(soar[0], sft[0])
    assert soar[1] == sft[1]
    assert torch.equal(soar[2], sft[2])


@pytest.mark.parametrize("paths", [1, 2])
def test_without_displacement_the_points_are_sft_at_their_levels(paths):
    """The control has the levels, weights and counts of SOAR, and states on the line to the noise."""
    seen = []

    class Spy(Analytic):
        def velocity(self, x, sigma, cond):
            seen.append((x.detach().clone(), sigma.clone()))
            return super().velocity(x, sigma, cond)

    batch, keys = some(), {"paths": paths, "chunk": 2, "points": 4, "max_gain": NO_BOUND}
    terms = list(Soar(displacement=0.0, **keys).terms(batch, context(Spy())))
    control = [level for _, level in seen]
    eps = context(model()).randn_like(batch.x0)
    for x, level in seen[1:]:
        times = len(x) // len(batch)
        torch.testing.assert_close(x, interpolate(batch.x0.repeat(times, 1, 1, 1), eps.repeat(times, 1, 1, 1), level))
    seen.clear()
    displaced = list(Soar(**keys).terms(batch, context(Spy())))
    assert torch.equal(torch.cat(control), torch.cat([level for _, level in [seen[0], *seen[2:]]])), "one call less"
    assert [float(t.count) for t in terms] == [float(t.count) for t in displaced]
    assert torch.equal(terms[0].total, displaced[0].total)
    assert not torch.equal(terms[1].total, displaced[1].total)


def test_displacement_1_is_the_paper():
    half, whole, default = (gradient(soar, some()) for soar in (Soar(displacement=0.5), Soar(displacement=1), Soar()))
    assert torch.equal(whole[2], default[2])
    assert not torch.allclose(half[2], whole[2])


@settings(max_examples=60, deadline=None)
@given(
    points=st.integers(1, 7),
    paths=st.integers(1, 3),
    chunk=st.integers(1, 8),
    weight=st.sampled_from([0.0, 0.5, 1.0]),
    noise=st.sampled_from(["shared", "fresh"]),
)
def test_as_many_terms_as_promised(points, paths, chunk, weight, noise):
    soar = Soar(points=points, paths=paths, chunk=chunk, weight=weight, noise=noise)
    terms = list(soar.terms(some(2, (1, 2, 2)), context(model(), 2)))
    assert len(terms) == soar.num_terms
    items = 2 + (2 * points * paths if weight else 0)
    # a stochastic path leaves out rows within one step of clean data; the seed's two levels are not
    assert sum(float(t.count) for t in terms) == items


@pytest.mark.parametrize(
    ("soar", "calls"),
    [
        (Soar(), [4, 4] + [4] * 6),
        (Soar(chunk=3), [4, 4, 12, 12]),
        (Soar(chunk=4), [4, 4, 16, 8]),
        (Soar(guidance=1.0), [4] + [4] * 6),
        (Soar(paths=2, points=2), [4, 4] + [4] * 4),
        (Soar(weight=0), [4]),
        (Soar(displacement=0.0, chunk=3), [4, 12, 12]),
    ],
    ids=str,
)
def test_forwards(soar, calls):
    """Base, the unconditional half of the rollout (the conditional one is the base's), and the points."""
    backbone = model()
    list(soar.terms(some(), context(backbone)))
    assert backbone.calls == calls


def test_what_the_model_is_told_is_where_the_state_is():
    """Wherever a model's velocity is exact, every term is 0: state, level and target belong together."""
    batch = some()

    class Oracle(Analytic):
        def velocity(self, x, sigma, cond):
            times = len(x) // len(batch)
            return (x - batch.x0.repeat(times, 1, 1, 1)) / expand_like(sigma, x)

    for soar in (Soar(guidance=1.0), Soar(guidance=4.5, paths=3, noise="fresh", chunk=4)):
        for term in soar.terms(batch, context(Oracle(), noise=Uniform())):
            assert float(term.metrics["loss"].max()) < 1e-9


@pytest.mark.parametrize("backward", [True, False])
def test_graphs_live_one_at_a_time(backward):
    """Saved activations at each yield are that term's own; the rollout and the terms before leave none."""
    alive, held = WeakSet(), []

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # an output that a node saves would keep itself alive
            alive.add(self)

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        terms = Soar(paths=2).terms(some(), context(model()))
        while term := next(terms, None):
            held.append(len(alive))
            if backward:
                term.total.backward()
                assert not alive
            del term
    assert not alive
    assert len(set(held[1:])) == 1
    assert held[1] <= held[0] + 3  # the bound on the gain and the mask of its path


def test_the_batch_is_left_as_it_was():
    batch = some()
    x0, c = batch.x0.clone(), batch.cond.tensors["c"].clone()
    list(Soar(paths=2, dropout=0.5, chunk=2).terms(batch, context(model())))
    assert torch.equal(batch.x0, x0)
    assert torch.equal(batch.cond.tensors["c"], c)
    assert not batch.x0.requires_grad


def test_dropout_is_per_sample_and_its_rollout_unguided():
    """math.md (b) 21: the published code drops whole batches. A dropped row does not see the guidance scale."""
    batch = some(rows=32)
    losses = [
        torch.stack([t.metrics["loss"] for t in Soar(dropout=share, guidance=scale).terms(batch, context(model(), 32))])
        for share, scale in ((0.0, 4.5), (0.5, 4.5), (0.5, 1.0))
    ]
    kept, dropped, unguided = losses
    changed = dropped[0] != kept[0]
    assert 0.25 < float(changed.float().mean()) < 0.75
    assert (dropped == unguided).all(0)[changed].all()
    assert not (dropped == unguided).all(0)[~changed].any()


def worst_case(**keys):
    """Largest loss where s is just above a step from clean and every point lies at the rollout's end."""
    draws = Draws(normal=[torch.ones(1, 2, 2, 2)], uniform=[torch.zeros(1)] * 6)
    ctx = context(model(), 1, noise=Given(torch.tensor([0.07])), rng=draws)
    batch = batch_of(torch.zeros(1, 2, 2, 2), torch.ones(1))
    return max(float(t.metrics["loss"].max()) for t in Soar(**keys).terms(batch, ctx))


def test_the_floor_keeps_targets_finite():
    """s* would be 0 here: the target's amplification is 0.07 / floor."""
    assert worst_case(max_gain=NO_BOUND, floor=1e-6) > 1e6
    assert worst_case(max_gain=NO_BOUND) < (1 + 0.07 / 0.003) ** 2 * 16
    assert worst_case() < 16


@pytest.mark.parametrize("sigma", [1e-30, 1e-6, 1e-3, 0.003, 1.0])
def test_no_level_below_the_floor_is_used(sigma):
    backbone = model()
    ctx = context(backbone, noise=Given(torch.full((4,), sigma), SigmaSqrt()))
    losses = [t.metrics["loss"] for t in Soar().terms(some(), ctx)]
    assert float(torch.cat(backbone.asked).min()) >= torch.tensor(0.003)
    assert torch.cat(losses).isfinite().all()


@attrs.define(eq=False)
class Wrong(Analytic):
    """Off by `error` in the rollout, exact on the straight line everywhere else."""

    exact: torch.Tensor = None
    error: float = 2.0

    def velocity(self, x, sigma, cond):
        self.calls.append(len(x))
        off = self.error if len(self.calls) == 1 else 0.0
        return self.exact + off + 0 * self.params.sum()


@pytest.mark.parametrize("max_gain", [0.01, 0.3, 1.0, NO_BOUND])
def test_max_gain_bounds_what_a_rollout_error_costs(max_gain):
    """A point's loss is (gain error)^2, and never above (max_gain error)^2."""
    z0, eps = torch.zeros(5, 1, 2, 2), torch.ones(5, 1, 2, 2)
    s, u = torch.tensor([0.01, 0.06, 0.2, 0.6, 0.99]), torch.tensor([0.0, 1e-3, 0.1, 0.5, 0.9])
    soar = Soar(points=1, guidance=1.0, max_gain=max_gain)
    ctx = context(Wrong(model().params, exact=eps - z0), 5, noise=Given(s), rng=Draws([eps], [u]))
    _, term = soar.terms(batch_of(z0, torch.zeros(5)), ctx)
    s_star = next_level(s, SHIFT, soar.steps, soar.floor)
    bound = gain(s, s_star, s_star + u * (1 - s_star)).clamp(max=max_gain)
    torch.testing.assert_close(term.metrics["loss"], (2 * bound) ** 2, rtol=1e-3, atol=1e-10)


@pytest.mark.parametrize(("max_gain", "share"), [(1e-3, 0.8), (0.3, 0.6), (1.0, 0.4), (NO_BOUND, 0)])
@pytest.mark.parametrize("chunk", [1, 2])
def test_the_share_of_points_that_max_gain_weighs_down_is_logged(max_gain, share, chunk):
    """A rollout's error grows by 19, 1.11, 0.94, 0.018 and 0.00085 in the targets of these five points."""
    s = torch.tensor([0.06, 0.06, 0.1, 0.6, 1.0])
    draws = Draws([torch.ones(5, 1, 2, 2)], [torch.tensor([0.0, 0.046, 0.04, 0.5, 0.9])] * 2)
    soar = Soar(points=2, guidance=1.0, max_gain=max_gain, chunk=chunk)
    batch = batch_of(torch.zeros(5, 1, 2, 2), torch.zeros(5))
    base, *corrections = soar.terms(batch, context(model(), 5, noise=Given(s), rng=draws))
    assert "bounded" not in base.metrics
    bounded = torch.cat([term.metrics["bounded"] for term in corrections])
    assert (len(bounded), float(bounded.mean())) == (10, pytest.approx(share))


@pytest.mark.parametrize(("normalize", "items"), [("items", 4 + 6 * 4 + 6 * 3), ("weighted", 4 + (6 * 4 + 6 * 3) / 2)])
def test_stochastic_paths_leave_out_what_is_next_to_clean(normalize, items):
    """math.md (b) 6: a row within a step of clean data has no room for noise; its ODE path stays."""
    levels = shifted(torch.tensor([0.02, 0.3, 0.7, 0.9]), SHIFT)
    ctx = context(model(), noise=Given(levels), rng=Rng(("test",), range(4)))
    terms = list(Soar(paths=2, weight=0.5, normalize=normalize, max_gain=1e-9).terms(some(), ctx))
    assert sum(float(t.count) for t in terms) == items
    assert all(t.metrics["loss"][0] > 0 for t in terms[:7])
    assert all(t.metrics["loss"][0] == 0 for t in terms[7:])
    assert all(t.metrics["bounded"].tolist() == [1, 1, 1, 1] for t in terms[1:7])
    assert all(t.metrics["bounded"].tolist() == [0, 1, 1, 1] for t in terms[7:])


def test_fresh_noise_is_one_for_each_path():
    """The shared-noise states lie on the line to eps; the fresh ones do not, and paths differ."""
    shared, fresh = (
        [t.metrics["loss"] for t in Soar(noise=n, points=1, guidance=1.0).terms(some(), context(model()))]
        for n in ("shared", "fresh")
    )
    assert torch.equal(shared[0], fresh[0])
    assert not (shared[1] == fresh[1]).any()


def test_the_sampler_is_used_by_further_paths_only():
    def losses(paths, sampler):
        return [t.metrics["loss"] for t in Soar(paths=paths).terms(some(), context(model(), sampler=sampler))]

    assert all(map(torch.equal, losses(1, Cps(0.5)), losses(1, FlowSde(0.9))))
    one, two = losses(2, Cps(0.5)), losses(2, FlowSde(0.9))
    assert all(map(torch.equal, one[:7], two[:7]))
    assert not any(map(torch.equal, one[7:], two[7:]))
    assert (Soar().uses, Soar(paths=2).uses) == ({"media", "noise"}, {"media", "noise", "stochastic"})


@pytest.mark.parametrize(
    ("key", "value"),
    [("points", 0), ("paths", 0), ("steps", 1), ("weight", -1), ("chunk", 0), ("dropout", 1), ("floor", 0)],
)
def test_keys_out_of_range_are_refused(key, value):
    with pytest.raises(ValueError, match=key):
        Soar(**{key: value})


def test_normalisations_agree_at_weight_1_only():
    means = {
        (weight, normalize): float(total / count)
        for weight in (1.0, 0.5)
        for normalize in ("items", "weighted")
        for total, count, _ in [gradient(Soar(weight=weight, normalize=normalize), some())]
    }
    assert means[1.0, "items"] == means[1.0, "weighted"]
    assert means[0.5, "weighted"] == pytest.approx(means[0.5, "items"] * (1 + 6) / (1 + 3), rel=1e-6)
    assert math.isfinite(sum(means.values()))
