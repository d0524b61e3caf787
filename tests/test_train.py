"""The loop: equal results however a batch is cut, faults before weights, averages, schedules."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from attrs import frozen
from training import trained, worst

from corefit import Batch, Context, Supervised, Term, ranks, train, weights
from corefit.errors import NonFinite, TrainingError
from corefit.flow import mix, per_sample
from corefit.objective import Sum, Summand
from corefit.stage import Lora, Optimizer
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


def _loaded(job: train.Job) -> dict[str, torch.Tensor]:
    job.backbone.load(torch.device("cpu"), torch.float32)
    return dict(job.backbone.transformer.named_parameters())


def test_the_average_is_what_the_stage_leaves(job):
    steps = [trained(job(steps=n)) for n in (1, 2)]
    start = _loaded(job())
    averaged = trained(job(steps=2, ema=0.5))
    expected = {n: 0.25 * start[n] + 0.25 * steps[0][n] + 0.5 * steps[1][n] for n in start}
    assert worst(averaged, {n: p.detach() for n, p in expected.items()}) < 1e-6


@frozen
class Spoilt(Supervised):
    """SFT whose loss or gradient is not finite in the steps from `at` until `until`, or in that one."""

    at: int = 2
    where: str = "loss"
    until: int | None = None

    def terms(self, batch: Batch, ctx: Context) -> Iterator[Term]:
        x0 = batch.clean
        noise, sigma = ctx.randn_like(x0), ctx.sigma(x0)
        v = ctx.backbone.velocity(mix(x0, noise, sigma), sigma, batch.cond)
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
    left = trained(train.Job(**{**_fields(spoilt), "logged": lambda step, m: lines.append(dict(m))}))
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
        train.train(train.Job(**{**_fields(spoilt), "stop": lambda: next(stops)}), ranks.join("fp32"))
    with pytest.raises(NonFinite, match=r"step 3: the loss of term 0"):
        train.train(spoilt, ranks.join("fp32"))


@frozen
class Unrewarded(Supervised):
    """SFT whose experience is not finite in one step, as a reward may be."""

    at: int = 1

    def experience(self, batch: Batch, ctx: Context) -> Iterator[Batch]:
        if batch.rows[0] // 8 == self.at:
            raise NonFinite("reward 'x' is not finite for ['a red 1']")
        yield batch

    def terms(self, batch: Batch, ctx: Context) -> Iterator[Term]:
        yield from Sft().terms(batch, ctx)


def test_an_experience_that_is_not_finite_stops_or_is_skipped(job):
    with pytest.raises(NonFinite, match="reward 'x'"):
        trained(job(Unrewarded()))
    left = trained(job(Unrewarded(), on_nan="skip"))
    assert worst(left, trained(job(Empty(at=1)))) == 0
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
    stopped = train.Job(**{**_fields(job(steps=2)), "stop": iter([False, True]).__next__})
    with pytest.raises(train.Stopped):
        train.train(stopped, ranks.join("fp32"))
    taken: list[int] = []
    again = train.Job(**{**_fields(stopped), "stop": lambda: False, "stepped": lambda step, m: taken.append(step)})
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
    with pytest.raises(AssertionError, match=r"Miscounted yielded 1 terms, not num_terms = 2"):
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

    for objective in (Misdealt(), Sum(of=(Summand("sft", Sft()), Summand("misdealt", Misdealt())))):
        with pytest.raises(AssertionError, match=f"Misdealt {said}"):
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


def test_gradients_are_clipped_to_the_norm(job):
    seen: list[float] = []
    clipped = job(max_grad_norm=1e-3, steps=1, log_every=1, optimizer=Optimizer(lr=1.0, eps=1e3, weight_decay=0))
    before = {n: p.clone() for n, p in _loaded(clipped).items()}
    logged = train.Job(**{**_fields(clipped), "logged": lambda step, m: seen.append(m["grad_norm"])})
    after = trained(logged)
    # with a huge eps, Adam's step is lr g / eps: its length shows the gradient's
    moved = sum(float(((after[n] - before[n]) ** 2).sum()) for n in after) ** 0.5
    assert seen[0] > 1e-3
    assert moved == pytest.approx(1e-3 / 1e3, rel=1e-2)


def _fields(job: train.Job) -> dict[str, object]:
    import attrs

    return {a.name: getattr(job, a.name) for a in attrs.fields(train.Job)}


def test_schedules():
    rates = Optimizer(lr=1.0, warmup=2, schedule="cosine")
    assert [round(rates.rate(s, 6), 3) for s in range(6)] == [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    assert [Optimizer(lr=1.0, schedule="linear").rate(s, 4) for s in range(4)] == [1, 0.75, 0.5, 0.25]


def test_the_reference_stays_while_the_policy_moves(job):
    mine = job()
    loop = train.Loop.build(mine, ranks.join("fp32"))
    frozen = weights.reference(mine.backbone, loop.named)
    x, sigma = torch.randn(2, *mine.dataset.shape), torch.tensor([0.3, 0.8])
    cond = mine.dataset.batch([0, 1], [0, 1]).cond
    with torch.no_grad():
        before = mine.backbone.velocity(x, sigma, cond)
        for p in loop.named.values():
            p.add_(0.01)
        assert torch.equal(frozen.velocity(x, sigma, cond), before)
        assert not torch.equal(mine.backbone.velocity(x, sigma, cond), before)


def test_metrics_are_means_over_items_and_steps(job):
    lines: list[dict[str, float]] = []
    mine = train.Job(**{**_fields(job(log_every=2, steps=4)), "logged": lambda s, m: lines.append(dict(m))})
    trained(mine)
    single: list[dict[str, float]] = []
    trained(train.Job(**{**_fields(job(log_every=1, steps=4)), "logged": lambda s, m: single.append(dict(m))}))
    losses = [m["loss"] for m in single]
    assert [m["loss"] for m in lines] == pytest.approx([np.mean(losses[:2]), np.mean(losses[2:])])
    json.dumps(lines)
