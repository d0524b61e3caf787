"""Moving copies of the trained weights: they follow as declared, whatever was skipped, stopped or averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch
from attrs import evolve, frozen
from safetensors.torch import load_file
from torch import Tensor
from training import Heard, trained, worst

from corefit import Batch, Context, Objective, Term
from corefit.errors import ConfigError, NonFinite, PluginError, Stopped, TrainingError
from corefit.flow import interpolate, per_sample
from corefit.plugins import contract
from corefit.system import ranks
from corefit.train import loop as train
from corefit.train import weights
from corefit.types import Moving, Weighted
from corefit.types.objective import Sum
from corefit.types.stage import Full, Lora
from corefit_sft import Sft

FP32 = ranks.join("fp32")


def slow(n: int) -> float:
    return min(n / (n + 1), 0.8)


def fast(n: int) -> float:
    """A refresh at every fourth move."""
    return 0.3 if n % 4 else 0.0


@frozen
class Drawn(Objective[Batch]):
    """Flow matching that is drawn to one copy that moves per batch, and to one that moves per update."""

    updates: int = 2
    prefix: str = ""
    decay: Callable[[int], Any] = slow
    bad: str = ""
    """What is not finite in the second step: "loss", or "experience" after the first update."""

    uses = frozenset({"media", "noise"})
    num_terms = 1

    @property
    def num_updates(self) -> int:
        return self.updates

    @property
    def copies(self) -> Mapping[str, Moving]:
        return {f"{self.prefix}old": Moving(self.decay), f"{self.prefix}near": Moving(fast, per="update")}

    def experience(self, batch: Batch, ctx: Context) -> Iterable[Batch]:
        for update in range(self.updates):
            if self.bad == "experience" and (ctx.step, update) == (1, 1):
                raise NonFinite("reward 'x' is not finite")
            yield batch

    def terms(self, batch: Batch, ctx: Context) -> Iterator[Term]:
        x0 = batch.clean
        noise, sigma = ctx.randn_like(x0), ctx.sigma(x0)
        x = interpolate(x0, noise, sigma)
        v = ctx.backbone.velocity(x, sigma, batch.cond)
        loss = per_sample((v - (noise - x0)) ** 2)
        for name in self.copies:
            loss = loss + per_sample((v - ctx.copies[name].velocity(x, sigma, batch.cond)) ** 2)
        yield Term.of(loss * float("nan") if self.bad == "loss" and ctx.step == 1 else loss)


def walked(job: Any, **keys: Any) -> tuple[train.Loop, list[dict[str, Tensor]]]:
    """Train a job to its end; the loop, and the weights at the start and after each optimizer step."""
    loop = train.Loop.build(evolve(job, **keys), FP32)
    every = [weights.copied(loop.state.trainable)]
    step = loop.state.optimizer.made.step

    def recorded(*args: Any) -> None:
        step(*args)
        every.append(weights.copied(loop.state.trainable))

    loop.state.optimizer.made.step = recorded
    batches = loop.batches()
    while loop.state.step < job.stage.steps:
        loop.take_step(next(batches))
    batches.close()
    return loop, every


def followed(every: list[dict[str, Tensor]], decay: Callable[[int], float]) -> dict[str, Tensor]:
    """copy <- d copy + (1 - d) weights, in float64, from the first of these weights over the others."""
    copy = {name: t.double() for name, t in every[0].items()}
    for n, moved in enumerate(every[1:], 1):
        copy = {name: decay(n) * t + (1 - decay(n)) * moved[name].double() for name, t in copy.items()}
    return copy


@pytest.mark.parametrize("mode", [Full(), Lora(rank=2)], ids=["full", "lora"])
def test_they_follow_as_declared(job, mode):
    loop, every = walked(job(Drawn(), mode, steps=5, ema=0.5))
    old, near = (dict(loop.state.copies[name].tensors) for name in ("old", "near"))
    assert worst(old, followed(every[::2], slow)) < 1e-6
    assert worst(near, followed(every, fast)) < 1e-6
    assert min(worst(old, every[0]), worst(old, every[-1]), worst(near, every[-1])) > 1e-4
    assert isinstance(mode, Full) or all(".lora_" in name for name in old)


@pytest.mark.parametrize("bad", ["loss", "experience"])
def test_they_move_whatever_was_skipped(job, bad):
    """The fourth move per update, in the second step, is a refresh: it is not missed."""
    loop, every = walked(job(Drawn(bad=bad), steps=4, on_nan="skip", max_skips=2))
    if bad == "experience":
        every.insert(4, every[3])  # the update that did not come
    assert len(every) == 9
    assert worst(every[2], every[4]) == 0 if bad == "loss" else worst(every[2], every[3]) > 0
    assert worst(dict(loop.state.copies["near"].tensors), followed(every, fast)) < 1e-6
    assert worst(dict(loop.state.copies["old"].tensors), followed(every[::2], slow)) < 1e-6


@pytest.mark.parametrize("mode", [Full(), Lora(rank=2)], ids=["full", "lora"])
def test_a_stopped_stage_ends_in_the_same_copies(job, mode):
    whole, parts = job(Drawn(), mode, steps=4), job(Drawn(), mode, steps=4)
    expected = trained(whole)
    stops = iter([False, True])
    with pytest.raises(Stopped):
        trained(evolve(parts, listener=Heard(asked=lambda: next(stops))))
    assert worst(expected, trained(parts)) == 0
    one, other = (_stored(each.folder) for each in (whole, parts))
    assert {name.split("/")[1] for name in one if name.startswith("copies/")} == {"old", "near"}
    assert worst(one, other) == 0


def _stored(folder: Any) -> dict[str, Tensor]:
    newest = max((folder / "checkpoints").iterdir())
    return {name: t for file in newest.glob("*.safetensors") for name, t in load_file(file).items()}


def test_the_average_leaves_them_alone(job):
    loop, _ = walked(job(Drawn(), ema=0.9))
    x, sigma = torch.randn(2, *loop.job.dataset.shape), torch.tensor([0.3, 0.8])
    cond = loop.job.dataset.batch([0, 1], [0, 1]).cond

    def velocities() -> list[Tensor]:
        return [backbone.velocity(x, sigma, cond) for backbone in (*loop.ctx.copies.values(), loop.ctx.backbone)]

    *before, policy = velocities()
    with loop.state.ema_applied():
        *within, average = velocities()
    assert all(map(torch.equal, before, within))
    assert not torch.equal(policy, average)
    assert not torch.equal(*before)


def test_a_copy_is_the_network_with_its_weights_and_has_no_graph(job):
    loop, _ = walked(job(Drawn()))
    x, sigma = torch.randn(2, *loop.job.dataset.shape, requires_grad=True), torch.tensor([0.3, 0.8])
    cond = loop.job.dataset.batch([0, 1], [0, 1]).cond
    found = loop.ctx.copies["old"].velocity(x, sigma, cond)
    assert not found.requires_grad
    for name, parameter in loop.state.trainable.items():
        parameter.data.copy_(loop.state.copies["old"].tensors[name])
    assert torch.equal(found, loop.ctx.backbone.velocity(x, sigma, cond))


def test_in_main_memory_they_are_the_same(job):
    here, there = (walked(job(Drawn(), steps=2, ema=0.5, copies=where))[0].state for where in (None, "cpu"))
    assert worst(here.ema.average, there.ema.average) == 0
    for name in ("old", "near"):
        assert worst(dict(here.copies[name].tensors), dict(there.copies[name].tensors)) == 0


def test_those_of_another_memory_are_brought_and_written_back():
    """As with a GPU: what is moved is not the copy itself."""

    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device("meta")

        def to(self, *args: Any, **kwargs: Any) -> Tensor:
            return self.as_subclass(Tensor).clone()

    held, new = {"w": torch.zeros(3).as_subclass(Elsewhere)}, {"w": torch.nn.Parameter(torch.ones(3))}
    weights.follow(held, new, lambda old, towards: old[0].lerp_(towards[0], 0.25))
    assert held["w"].tolist() == [0.25] * 3


def test_progress_is_told(job):
    seen: list[tuple[int, int]] = []

    @frozen
    class Telling(Sft):
        def terms(self, part: Batch, ctx: Context) -> Iterator[Term]:
            seen.append((ctx.step, ctx.steps))
            yield from Sft.terms(self, part, ctx)

    told = job(Telling(), steps=3)
    stops = iter([True])
    with pytest.raises(Stopped):
        trained(evolve(told, listener=Heard(asked=lambda: next(stops))))
    trained(told)
    assert seen == [(0, 3), (1, 3), (2, 3)]


def _sum(*prefixes: str) -> Sum:
    return Sum(of=tuple(Weighted(f"drawn {i}", Drawn(prefix=p), 0.5) for i, p in enumerate(prefixes)))


def test_objectives_of_a_sum_keep_their_own(job):
    with pytest.raises(ConfigError, match=r"must not list 'drawn 0' and 'drawn 1' together.* copy .* named 'near'"):
        _sum("", "")
    loop, every = walked(job(_sum("a", "b"), steps=2))
    assert loop.state.copies.keys() == {"aold", "anear", "bold", "bnear"}
    for name in "ab":
        assert worst(dict(loop.state.copies[f"{name}near"].tensors), followed(every, fast)) < 1e-6


@pytest.mark.parametrize("given", [1.5, -0.1, float("nan"), "half", None])
def test_a_decay_that_is_no_share_names_copy_and_objective(job, given):
    with pytest.raises(PluginError, match=r"the decay at move 2 of the copy 'old' of Drawn \(.*test_copies.py\) is .*"):
        trained(job(Drawn(decay=lambda n: 0.5 if n < 2 else given)))


def test_a_copy_that_is_not_finite_is_not_saved(job):
    loop, _ = walked(job(Drawn(), steps=1))
    next(iter(loop.state.copies["near"].tensors.values())).view(-1)[0] = float("inf")
    with pytest.raises(TrainingError, match="after step 1 are not finite and are not saved"):
        loop.save()


def test_a_checkpoint_with_other_copies_is_refused(job):
    first = job(Drawn(), steps=1)
    trained(first)
    for other, names in ((Drawn(prefix="a"), r"\['anear', 'aold'\]"), (Sft(), r"\[\]")):
        renamed = evolve(first, stage=evolve(first.stage, objective=other, steps=2))
        with pytest.raises(TrainingError, match=rf"step-000001 holds the copies \['near', 'old'\].* {names}"):
            trained(renamed)


@pytest.mark.parametrize(
    ("copies", "said"),
    [
        ({"old": 0.5}, "copies of .* is .*, not a mapping of names"),
        ({"a/b": Moving(slow)}, "not a mapping of names"),
        (["old"], "not a mapping of names"),
        (lambda: {"old": Moving(slow, per="step")}, "copies of .* fails .*'per' must be in"),
        (lambda: {"old": Moving(0.5)}, "copies of .* fails"),
    ],
)
def test_what_is_declared_wrongly_is_named(copies, said):
    class Wrong(Sft):
        @property
        def copies(self):
            return copies() if callable(copies) else copies

    with pytest.raises(PluginError, match=said):
        contract.declared(Wrong(), "objectives")
