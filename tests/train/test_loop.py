"""The loop: equal results however a batch is cut, faults before weights, averages, schedules."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from attrs import frozen
from training import Heard, trained, worst

from corefit import Batch, Context, Supervised, Term
from corefit.errors import NonFinite, PluginError, TrainingError
from corefit.flow import interpolate, per_sample
from corefit.system import ranks
from corefit.train import loop as train
from corefit.train import weights
from corefit.types import Weighted
from corefit.types.objective import Sum
from corefit.types.stage import Full, Lora, Optimizer
from corefit_backbones.sd3 import Sd3
from corefit_sft import Sft
from corefit_soar import Soar


@pytest.mark.parametrize("objective", [Sft(dropout=0.3), Soar(points=2, paths=1), Soar(points=3, chunk=2)])
def test_micro_batches_do_not_change_the_result(job, objective):
    # Adam divides by the gradient's size, so rounding shows at lr scale where a gradient is nearly 0
    whole = trained(job(objective, optimizer=Optimizer(lr=1e-3, eps=1e-3)))
    parts = trained(job(objective, optimizer=Optimizer(lr=1e-3, eps=1e-3), micro_batch=3))
    assert worst(whole, parts) < 1e-6


def test_training_changes_weights_and_is_deterministic(job, checkpoint):
    first, second = trained(job()), trained(job())
    before = Sd3(path=str(checkpoint))
    before.load(torch.device("cpu"), torch.float32)
    assert worst(first, second) == 0
    assert worst(first, dict(before.transformer.named_parameters())) > 1e-4


def test_lora_trains_the_adapter_alone(job):
    mine = job(mode=Lora(rank=4))
    base = {n: p.clone() for n, p in _loaded(mine).items()}
    adapter = trained(mine)
    assert adapter
    assert all("lora_" in name for name in adapter)
    after = {n.replace(".base_layer", ""): p for n, p in mine.backbone.transformer.named_parameters()}
    assert worst(base, {n: p for n, p in after.items() if n in base}) == 0
    assert any(float(p.abs().max()) > 0 for n, p in adapter.items() if "lora_B" in n)


def _started(job: train.Job, on: ranks.Ranks) -> weights.Trainable:
    """What trains, as the first step finds it."""
    return weights.load(job.backbone, on, frozen_in_bf16=job.frozen_in_bf16, mode=job.mode, seed=job.seed)


def _loaded(job: train.Job) -> dict[str, torch.Tensor]:
    job.backbone.load(torch.device("cpu"), torch.float32)
    return dict(job.backbone.transformer.named_parameters())


def test_the_average_is_what_the_stage_leaves(job):
    steps = [trained(job(steps=n)) for n in (1, 2)]
    start = _loaded(job())
    averaged = trained(job(steps=2, ema=0.5))
    expected = {n: 0.25 * start[n] + 0.25 * steps[0][n] + 0.5 * steps[1][n] for n in start}
    assert worst(averaged, {n: p.detach() for n, p in expected.items()}) < 1e-6


@pytest.mark.parametrize("mode", [None, Lora(rank=4)], ids=["full", "lora"])
def test_observers_see_the_average_and_leave_training_as_it_is(job, mode):
    """They see what the stage would leave if it ended there, and weights and average are afterwards what they were."""
    seen: dict[int, dict[str, torch.Tensor]] = {}
    watched = job(mode=mode, steps=3, ema=0.5, log_every=1)

    def look(step: int, _: object) -> None:
        network = watched.backbone.transformer
        seen[step] = {n: p.detach().clone() for n, p in network.named_parameters() if p.requires_grad}

    left = trained(attrs.evolve(watched, listener=Heard(on_logged=look)))
    assert worst(left, trained(job(mode=mode, steps=3, ema=0.5))) == 0
    assert [worst(seen[n], trained(job(mode=mode, steps=n, ema=0.5))) for n in (1, 2, 3)] == [0, 0, 0]
    assert worst(seen[1], seen[2]) > 1e-6


def test_the_average_goes_back_where_an_observer_raises(job):
    loop = train.Loop.build(job(ema=0.5), ranks.join("fp32"))
    assert loop.state.ema
    for p in loop.state.trainable.values():
        p.data.add_(1)
    before = {n: p.detach().clone() for n, p in loop.state.trainable.items()}
    moved = []

    def observe() -> None:
        with loop.state.ema_applied():
            moved.append(worst(dict(loop.state.trainable), before))
            raise RuntimeError("the tracker is away")

    with pytest.raises(RuntimeError, match="away"):
        observe()
    assert moved == pytest.approx([1], abs=1e-5)
    assert worst(dict(loop.state.trainable), before) == 0


@frozen
class Spoilt(Supervised):
    """SFT whose loss or gradient is not finite in the steps from `at` until `until`, or in that one."""

    at: int = 2
    where: str = "loss"
    until: int | None = None

    def terms(self, batch: Batch, ctx: Context) -> Iterator[Term]:
        x0 = batch.clean
        noise, sigma = ctx.randn_like(x0), ctx.sigma(x0)
        v = ctx.backbone.velocity(interpolate(x0, noise, sigma), sigma, batch.cond)
        bad = self.at <= batch.rows[0] // 8 <= (self.at if self.until is None else self.until)
        if bad and self.where == "gradient":
            v = (v - v.detach()).abs().sqrt() + v.detach()  # sqrt'(0) is infinite
        loss = per_sample((v - (noise - x0)) ** 2)
        yield Term.of(loss * float("nan") if bad and self.where == "loss" else loss)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_fault_stops_before_a_weight_is_touched(job, where):
    spoilt = job(Spoilt(where=where), steps=5)
    with pytest.raises(TrainingError, match=rf"stage s, step 2: the {'loss of term 0' if where == 'loss' else 'grad'}"):
        train.train(spoilt, ranks.join("fp32"))
    good = trained(job(Spoilt(at=99), steps=2))
    left = dict(spoilt.backbone.transformer.named_parameters())
    assert worst(good, {n: p.detach() for n, p in left.items()}) == 0
    assert not list(spoilt.folder.glob("checkpoints/*"))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_fault_is_skipped_where_the_stage_says_so(job, where):
    lines: list[dict[str, float]] = []
    spoilt = job(Spoilt(at=1, where=where), steps=3, on_nan="skip", ema=0.5, log_every=3)
    left = trained(train.Job(**{**_fields(spoilt), "listener": Heard(on_logged=lambda step, m: lines.append(dict(m)))}))
    assert lines[-1]["skipped"] == 1
    assert all(np.isfinite(list(lines[-1].values())))
    # as if the batch of that step had not been: weights, averages and Adam's own step count stay
    assert worst(left, trained(job(Spoilt(at=99), steps=3, ema=0.5))) > 1e-6
    expected = trained(job(Empty(at=1), steps=3, ema=0.5))
    assert worst(left, expected) == 0


def test_skipping_is_bounded(job):
    spoilt = job(Spoilt(at=1, until=9), steps=9, on_nan="skip", max_skips=2)
    with pytest.raises(NonFinite, match=r"step 3: the loss of term 0 is not finite \(max_skips = 2 optimizer steps"):
        train.train(spoilt, ranks.join("fp32"))
    good = trained(job(Spoilt(at=99), steps=1))
    assert worst(good, {n: p.detach() for n, p in spoilt.backbone.transformer.named_parameters()}) == 0


def test_skipped_steps_are_counted_over_a_resume(job):
    spoilt = job(Spoilt(at=1, until=9), steps=9, on_nan="skip", max_skips=2)
    stops = iter([False, False, True])
    with pytest.raises(train.Stopped):
        train.train(train.Job(**{**_fields(spoilt), "listener": Heard(asked=lambda: next(stops))}), ranks.join("fp32"))
    with pytest.raises(NonFinite, match=r"step 3: the loss of term 0"):
        train.train(spoilt, ranks.join("fp32"))


@frozen
class Unrewarded(Supervised):
    """SFT whose experience is not finite in one step, as a reward may be, or the terms of its second half are not."""

    at: int = 1
    where: str = "experience"

    def experience(self, batch: Batch, ctx: Context) -> Iterator[Batch]:
        self.score(batch, "experience")
        yield batch

    def terms(self, batch: Batch, ctx: Context) -> Iterator[Term]:
        if batch.rows[0] % 8 == 4:
            self.score(batch, "terms")
        yield from Sft().terms(batch, ctx)

    def score(self, batch: Batch, where: str) -> None:
        if where == self.where and batch.rows[0] // 8 == self.at:
            raise NonFinite("reward 'x' is not finite for ['a red 1']")


@pytest.mark.parametrize("where", ["experience", "terms"])
def test_scores_that_are_not_finite_stop_the_stage_or_are_skipped(job, where):
    """The gradient that the first half of a batch has left by then is dropped, and the step proves no sizes."""
    with pytest.raises(NonFinite, match="reward 'x'"):
        trained(job(Unrewarded(where=where), micro_batch=4))
    skipping = job(Unrewarded(where=where), on_nan="skip", micro_batch=4)
    assert worst(trained(skipping), trained(job(Empty(at=1), micro_batch=4))) == 0
    once = job(Unrewarded(where=where), on_nan="skip", micro_batch=4, steps=2)
    loop = train.Loop.build(once, ranks.join("fp32"))
    for _, batch in zip(range(2), loop.batches(), strict=False):
        loop.take_step(batch)
    assert list(loop.state.sizes.proven.values()) == [1]


def test_an_experience_that_is_never_finite_stops_the_stage(job):
    with pytest.raises(NonFinite, match="reward 'x'"):
        trained(job(Always(), on_nan="skip", max_skips=1))


@frozen
class Always(Supervised):
    """An experience that is never finite."""

    def experience(self, batch: Batch, ctx: Context) -> Iterator[Batch]:
        raise NonFinite("reward 'x' is not finite for ['a red 1']")

    def terms(self, batch: Batch, ctx: Context) -> Iterator[Term]:
        yield from Sft().terms(batch, ctx)


def test_weights_that_are_not_finite_are_not_saved(job):
    wild = job(steps=1, optimizer=Optimizer(lr=1e38, weight_decay=1e6))
    with pytest.raises(TrainingError, match=r"the weights after step 1 are not finite and are not saved.*Lower"):
        train.train(wild, ranks.join("fp32"))
    assert not list(wild.folder.glob("checkpoints/*"))


def test_the_last_step_leaves_a_checkpoint(job):
    """A process that dies while it saves the model need not train again."""
    mine = job(steps=3, checkpoint_every=2)
    trained(mine)
    assert [path.name for path in sorted((mine.folder / "checkpoints").iterdir())] == ["step-000002", "step-000003"]


def test_a_stop_in_the_last_step_leaves_nothing_to_do(job):
    stopped = train.Job(**{**_fields(job(steps=2)), "listener": Heard(asked=iter([False, True]).__next__)})
    with pytest.raises(train.Stopped):
        train.train(stopped, ranks.join("fp32"))
    taken: list[int] = []
    again = train.Job(**{**_fields(stopped), "listener": Heard(on_stepped=taken.append)})
    left = trained(again)
    assert taken == []
    assert worst(left, trained(job(steps=2))) == 0


@frozen
class Miscounted(Supervised):
    @property
    def num_terms(self) -> int:
        return 2

    def terms(self, batch: Batch, ctx: Context) -> Iterator[Term]:
        yield from Sft().terms(batch, ctx)


def test_a_wrong_number_of_terms_is_named(job):
    with pytest.raises(PluginError, match=r"Miscounted .* yielded 1 terms, not num_terms = 2; fix it"):
        train.train(job(Miscounted()), ranks.join("fp32"))


@pytest.mark.parametrize(
    ("made", "said"), [(0, "yielded 0 parts, not num_updates = 1"), (2, "yields more than num_up")]
)
def test_the_number_of_parts_must_be_as_declared(job, made, said):
    """None would leave the weights as they are, in silence."""

    @frozen
    class Misdealt(Sft):
        def experience(self, batch: Batch, ctx: Context) -> Iterator[Batch]:
            yield from [batch] * made

    for objective in (Misdealt(), Sum(of=(Weighted("sft", Sft()), Weighted("misdealt", Misdealt())))):
        with pytest.raises(PluginError, match=f"Misdealt .* {said}"):
            trained(job(objective))


@frozen
class Empty(Supervised):
    """Nothing is supervised in any step, or in one."""

    at: int | None = None

    def terms(self, batch: Batch, ctx: Context) -> Iterator[Term]:
        term = next(Sft().terms(batch, ctx))
        yield Term(term.total * 0, 0.0) if self.at in (None, batch.rows[0] // 8) else term


def test_a_step_without_items_leaves_weights_as_they_are(job):
    assert worst(trained(job(Empty())), {n: p.detach() for n, p in _loaded(job()).items()}) == 0


@frozen
class Scaled(Supervised):
    """SFT, its totals and counts times a number: the division must undo it."""

    by: float = 1.0

    def terms(self, batch: Batch, ctx: Context) -> Iterator[Term]:
        term = next(Sft().terms(batch, ctx))
        yield Term(term.total * self.by, term.count * self.by)


def test_totals_are_divided_by_the_count_once(job):
    assert worst(trained(job(Scaled(1.0))), trained(job(Scaled(64.0)))) < 1e-6


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_gradients_are_clipped_to_the_norm(job, limit):
    """Those of a smaller norm stay as they are."""
    seen: list[float] = []
    clipped = job(max_grad_norm=limit, steps=1, log_every=1, optimizer=Optimizer(lr=1.0, eps=1e3, weight_decay=0))
    before = {n: p.detach().clone() for n, p in _loaded(clipped).items()}
    logged = train.Job(**{**_fields(clipped), "listener": Heard(on_logged=lambda step, m: seen.append(m["grad_norm"]))})
    after = trained(logged)
    # with a huge eps, Adam's step is lr g / eps: its length shows the gradient's
    moved = sum(float(((after[n] - before[n]) ** 2).sum()) for n in after) ** 0.5
    assert 1e-3 < seen[0] < 1e3
    assert moved == pytest.approx(min(limit, seen[0]) / 1e3, rel=1e-2)


def _fields(job: train.Job) -> dict[str, object]:
    import attrs

    return {a.name: getattr(job, a.name) for a in attrs.fields(train.Job)}


def test_schedules():
    rates = Optimizer(lr=1.0, warmup=2, schedule="cosine")
    assert [round(rates.rate(s, 6), 3) for s in range(6)] == [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    assert [Optimizer(lr=1.0, schedule="linear").rate(s, 4) for s in range(4)] == [1, 0.75, 0.5, 0.25]


def test_a_step_has_its_own_rate_and_no_later_one(job):
    """The first of two steps of warm-up has half the rate."""
    warm = trained(job(steps=1, optimizer=Optimizer(lr=2e-3, warmup=2)))
    assert worst(warm, trained(job(steps=1, optimizer=Optimizer(lr=1e-3)))) == 0


@pytest.mark.parametrize(("every", "rates"), [(1, [1e-3, 2e-3, 3e-3, 4e-3]), (2, [2e-3, 4e-3]), (3, [3e-3, 4e-3])])
def test_the_rate_that_is_logged_is_that_of_the_step_just_taken(job, every, rates):
    lines: list[float] = []
    mine = job(Empty(), steps=4, log_every=every, optimizer=Optimizer(lr=4e-3, warmup=4))
    trained(train.Job(**{**_fields(mine), "listener": Heard(on_logged=lambda step, m: lines.append(m["lr"]))}))
    assert lines == pytest.approx(rates)


@frozen
class Drawing(Supervised):
    """SFT that notes the noise it draws."""

    drawn: list[torch.Tensor]

    def experience(self, batch: Batch, ctx: Context) -> Iterator[Batch]:
        self.drawn.append(ctx.randn_like(batch.clean))
        yield batch

    def terms(self, batch: Batch, ctx: Context) -> Iterator[Term]:
        self.drawn.append(ctx.randn_like(batch.clean))
        yield from Sft().terms(batch, ctx)


def test_noise_is_of_a_seed_a_stage_a_step_and_a_purpose(job):
    drawn: list[torch.Tensor] = []
    for name, seed in (("a", 0), ("a", 0), ("b", 0), ("a", 1)):
        trained(train.Job(**{**_fields(job(Drawing(drawn), name=name, steps=2)), "seed": seed}))
    first, again, *others = (torch.cat(drawn[i : i + 4]) for i in range(0, 16, 4))
    assert torch.equal(first, again)
    values = torch.cat([first, *others]).flatten()
    assert len(values.unique()) > 0.99 * len(values)


@pytest.fixture
def join() -> Iterator[Callable[[str], ranks.Ranks]]:
    """Joins in a precision; accelerate has one a process unless it forgets. bf16 is autocast on the CPU."""
    from accelerate.state import AcceleratorState

    def joined(precision: str) -> ranks.Ranks:
        AcceleratorState._reset_state()
        return ranks.join(precision)

    yield joined
    AcceleratorState._reset_state()


@pytest.mark.parametrize("mode", [Full(), Lora(rank=4)], ids=["full", "lora"])
def test_in_bf16_the_weights_that_train_stay_in_float32(job, join, mode):
    """The others are kept in bf16; a stop does not change a bit, and the result is nearly that of float32."""
    keys = {"mode": mode, "optimizer": Optimizer(lr=1e-3, eps=1e-3)}

    def of(objective: Any = None, **more: Any) -> train.Job:
        return train.Job(**{**_fields(job(objective, **keys)), "frozen_in_bf16": isinstance(mode, Lora), **more})

    half, mine = join("bf16"), of()
    rounded = trained(mine, half)
    assert {t.dtype for t in rounded.values()} == {torch.float32}
    still = {p.dtype for p in mine.backbone.transformer.parameters() if not p.requires_grad}
    assert still == ({torch.bfloat16} if isinstance(mode, Lora) else set())
    stopped = of(listener=Heard(asked=iter([True]).__next__))
    with pytest.raises(train.Stopped):
        train.train(stopped, half)
    assert worst(trained(train.Job(**{**_fields(stopped), "listener": Heard()}), half), rounded) == 0
    start = dict(_started(of(), half))
    assert worst(trained(of(Empty()), half), start) == 0, "what trains is not rounded when it is read"
    exact = trained(job(**keys), join("fp32"))
    assert 0 < worst(rounded, exact) < 0.2 * worst(exact, start)


def test_alpha_over_rank_scales_an_adapter_also_when_it_is_read(job, tmp_path):
    mine = job(mode=Lora(rank=4, alpha=10.0))
    named, network = _started(mine, ranks.join("fp32")), mine.backbone.transformer
    for name, p in named.items():
        if ".lora_B." in name:
            torch.nn.init.constant_(p, 0.02)
    adapted = network.transformer_blocks[0].attn.to_q
    x = torch.randn(3, adapted.in_features)
    delta = 10 / 4 * adapted.lora_B["default"](adapted.lora_A["default"](x))
    torch.testing.assert_close(adapted(x) - adapted.base_layer(x), delta)
    mine.backbone.save(tmp_path / "lora")
    read = job().backbone
    read.load(torch.device("cpu"), torch.float32)
    read.load_lora(tmp_path / "lora")
    again = read.transformer.transformer_blocks[0].attn.to_q
    torch.testing.assert_close(again(x), adapted(x))


@pytest.mark.parametrize("warmup", [0, 1, 3])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_are_those_of_transformers(schedule, warmup):
    """From the end of the warm-up on; theirs begins with a step at rate 0, which ours leaves out."""
    from transformers import get_scheduler

    steps, name = 9, "constant_with_warmup" if schedule == "constant" else schedule
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    rates = [0.0] * steps
    for step in range(steps):
        rates[step] = theirs.get_last_lr()[0]
        optimizer.step()
        theirs.step()
    ours = [Optimizer(lr=0.3, warmup=warmup, schedule=schedule).rate(step, steps) for step in range(steps)]
    assert ours[warmup:] == pytest.approx(rates[warmup:])
    assert ours[:warmup] == pytest.approx([0.3 * (step + 1) / warmup for step in range(warmup)])
    assert rates[:warmup] == pytest.approx([0.3 * step / warmup for step in range(warmup)])
    if schedule == "linear":
        assert ours[-1] == pytest.approx(0.3 / (steps - warmup))


def test_the_reference_stays_while_the_policy_moves(job):
    mine = job()
    loop = train.Loop.build(mine, ranks.join("fp32"))
    trained = loop.state.trainable
    frozen = weights.called_with(mine.backbone, trained, weights.copied(trained))
    x, sigma = torch.randn(2, *mine.dataset.shape), torch.tensor([0.3, 0.8])
    cond = mine.dataset.batch([0, 1], [0, 1]).cond
    with torch.no_grad():
        before = mine.backbone.velocity(x, sigma, cond)
        for p in loop.state.trainable.values():
            p.add_(0.01)
        assert torch.equal(frozen.velocity(x, sigma, cond), before)
        assert not torch.equal(mine.backbone.velocity(x, sigma, cond), before)


def test_metrics_are_means_over_items_and_steps(job):
    lines: list[dict[str, float]] = []
    mine = attrs.evolve(job(log_every=2, steps=4), listener=Heard(on_logged=lambda s, m: lines.append(dict(m))))
    trained(mine)
    single: list[dict[str, float]] = []
    heard = Heard(on_logged=lambda s, m: single.append(dict(m)))
    trained(attrs.evolve(job(log_every=1, steps=4), listener=heard))
    losses = [m["loss"] for m in single]
    assert [m["loss"] for m in lines] == pytest.approx([np.mean(losses[:2]), np.mean(losses[2:])])
    json.dumps(lines)
