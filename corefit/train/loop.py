"""The only training loop: `train` runs a stage, `Loop.take_step` is one of its steps.

A step takes one batch, which the objective turns into experience: one or more parts, each of which is what one
optimizer step trains on. A part is cut into micro-batches, whose loss the objective yields in terms; a term is
backpropagated and its graph freed before the next one is computed. Then the gradient is divided once, by the number of
items on all ranks, and the optimizer takes its step. Where the objective is a weighted sum, all but the optimizer's
step is done for one of its objectives after the other. Where memory runs out before a weight has changed, the step is
taken again in smaller pieces.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import TYPE_CHECKING, Any

import attrs
from attrs import define

from corefit.data import loader
from corefit.data.coding import Coder
from corefit.data.order import BatchSampler
from corefit.errors import NonFinite, Stopped
from corefit.plugins import contract
from corefit.rng import Rng
from corefit.rollout.noise import LogitNormal
from corefit.rollout.samplers import Ode
from corefit.system import memory
from corefit.system.ranks import Ranks
from corefit.train import measuring, remedies, reporting, weights
from corefit.train.alarm import Watch
from corefit.train.gradients import Gradients
from corefit.train.job import Cost, Job
from corefit.train.meters import NonFiniteGuard
from corefit.train.optimizer import Steps
from corefit.train.retry import Retry
from corefit.train.sharding import Sharding
from corefit.train.sizes import Sizes, conditions
from corefit.train.state import State
from corefit.types import Batch, blame
from corefit.types.objective import (
    Context,
    Objective,
    Part,
    checked_parts,
    further_media,
    term_names,
    weighted_objectives,
)

if TYPE_CHECKING:
    from torch import Tensor


def train(job: Job, ranks: Ranks) -> Cost:
    """Train a stage from its newest checkpoint on, and leave the final weights in the backbone, sharded as it was.

    Raises NonFinite where a loss or gradient is not finite, before a weight has changed because of it, and Stopped
    where the listener requests a stop, after a checkpoint has been written.
    """
    loop = Loop.resume(job, ranks)
    loop.report_start()
    with closing(loop.batches()) as batches:
        while not loop.finished:
            loop.take_step(next(batches))
            loop.report_step()
            if ranks.any(job.listener.stop_requested()):
                raise Stopped(loop.save())
            if loop.checkpoint_is_due():
                loop.save()
    return loop.finish()


@define(eq=False, kw_only=True)
class Loop:
    """A stage in training.

    ctx         what objectives may use
    state       how far training has come: all that a checkpoint holds
    retry       takes a step again where memory ran out
    """

    job: Job
    ranks: Ranks
    ctx: Context
    gradients: Gradients
    sharding: Sharding
    state: State
    retry: Retry
    _is_first_step: bool = True
    """Whether this process has not taken a step yet."""
    _draws: list[float] | None = None
    """In the first step on several ranks, numbers of the noise that this rank drew; ranks then compare them."""

    @staticmethod
    def resume(job: Job, ranks: Ranks) -> Loop:
        """Build the loop and continue from the stage's newest whole checkpoint, if there is one."""
        gpu = ranks.device.type != "cpu"
        helps = remedies.weights_helps(job.mode, ranks.world, sharded=ranks.sharded, gpu=gpu)
        with memory.explain_exhaustion(f"stage {job.stage.name}, loading the weights", helps):
            loop = Loop.build(job, ranks)
            loop.state.resume(job.stage.keep)
        loop.sharding.announce(job.stage.name, ranks)
        reporting.announce_alarm(job.stage, ranks)
        return loop

    @staticmethod
    def build(job: Job, ranks: Ranks) -> Loop:
        """Load the network, choose the weights that train, and put everything on the device."""
        stage, backbone, device = job.stage, job.backbone, ranks.device
        trainable = weights.load(
            backbone, ranks, frozen_in_bf16=job.frozen_in_bf16, adapter=job.adapter, mode=job.mode, seed=job.seed
        )
        backbone.empty = job.dataset.null.to(device)
        uses, on_host = stage.objective.uses, stage.copies == "cpu"
        copies = weights.MovingCopy.declared(stage.objective, trainable, on_host=on_host)
        sharding = Sharding.of(backbone.transformer, ranks, len(copies) + ("reference" in uses))
        frozen = functools.partial(weights.called_with, backbone, trainable, sharding=sharding)
        ctx = Context(
            backbone=backbone,
            sampler=stage.sampler or Ode(),
            noise=stage.noise or LogitNormal(),
            rng=Rng((job.seed, stage.name), []),
            rewards=stage.reward,
            reference=frozen(weights.copied(trainable, on_host=on_host)) if "reference" in uses else None,
            agree=ranks.agree,
            scores=ranks.leads,
            copies={name: frozen(held.tensors) for name, held in copies.items()},
            steps=stage.steps,
            held_out=stage.held_out,
            decode=Coder(backbone).decode,
        )
        # a sharded network only gets autocast; another one is wrapped in DDP as well
        weights.prepare(backbone, ranks, evaluation=ranks.sharded)
        state = State(
            stage=stage.name,
            folder=job.folder / "checkpoints",
            ranks=ranks,
            transformer=backbone.transformer,
            trainable=trainable,
            optimizer=Steps.of(stage.optimizer, trainable),
            ema=weights.Ema.of(trainable, stage.ema, on_host=on_host) if stage.ema is not None else None,
            guard=NonFiniteGuard.none(device, term_names(stage.objective), stage.skips),
            sizes=Sizes.of(stage, ranks.data_world, conditions(stage, backbone, ranks)),
            copies=copies,
            watch=Watch(stage.watch) if stage.watch else None,
        )
        gradients = Gradients(trainable, ranks)
        retry = Retry(ranks, state, gradients)
        return Loop(job=job, ranks=ranks, ctx=ctx, gradients=gradients, sharding=sharding, state=state, retry=retry)

    def batches(self) -> Generator[Batch, None, None]:
        """Yield this rank's share of each step's batch, endlessly, from the next step on."""
        stage, dataset = self.job.stage, self.job.dataset
        sampler = BatchSampler(
            buckets=list(dataset.buckets.values()),
            batch=stage.rows,
            group=stage.objective.group_size,
            seed=self.job.seed,
            stage=stage.name,
            order=self.job.order,
        )
        return loader.batches(
            dataset,
            sampler,
            start=self.state.step,
            rank=self.ranks.data_rank,
            world=self.ranks.data_world,
            device=self.ranks.device,
            extra=further_media(stage.objective),
        )

    def take_step(self, batch: Batch) -> None:
        """Turn one batch into experience, and take an optimizer step on each part of it."""
        started = time.perf_counter()
        self._set_learning_rate()
        number = self.job.stage.objective.num_updates
        moves = iter(range(self.state.step * number + 1, (self.state.step + 1) * number + 1))
        try:
            with self.sharding.step():
                for scale, no_items in self._gradients(batch):
                    with self._explain_exhaustion("the optimizer's step"):
                        self.gradients.merge()
                        self._apply_gradient(scale, no_items)
                    self.state.move_copies("update", next(moves))
        except NonFinite:  # raised by the experience or by terms: no weight has changed because of it
            if self._skipped_too_many():
                raise
            self.gradients.drop()
        else:  # a step that ended early says nothing of its memory
            self.state.sizes.fitted(batch.shape)
        if self._draws is not None:
            self.ranks.refuse_same_noise(self._draws, self.job.stage.name)
        for move in moves:  # the copies' schedule does not depend on what was skipped
            self.state.move_copies("update", move)
        self.state.step += 1
        self.state.move_copies("batch", self.state.step)
        if self.ranks.device.type == "cpu":  # where looking costs no wait
            self.state.guard.refuse(self.job.stage.name, self.ranks)
        self.state.add_time(self.job.stage.rows, time.perf_counter() - started)
        self._is_first_step = False

    def _gradients(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Accumulate the gradient of each optimizer step in turn; yield its factor [], and whether it has no items.

        Where memory runs out, all that came before the first optimizer step is done again. Later, when weights have
        changed, only the part in progress is.
        """
        self._choose_sizes(batch)
        self.retry.begin(batch.shape)
        parts, gradient = self.retry.until_it_fits(lambda: self._first_gradient(batch))
        yield gradient
        for update, parts_of_update in enumerate(parts, 1):
            again = functools.partial(self._accumulate, parts_of_update, update)
            yield self.retry.until_it_fits(again)

    def _first_gradient(self, batch: Batch) -> tuple[Iterator[tuple[Part, ...]], tuple[Tensor, Tensor]]:
        """Begin the experience, and accumulate the gradient of its first part; return the other parts, and that."""
        self._draws = [] if self._is_first_step and self.ranks.world > 1 else None
        parts = self._parts_by_update(batch)
        return parts, self._accumulate(next(parts), 0)

    def _choose_sizes(self, batch: Batch) -> None:
        """In the first step, choose the sizes to begin with by what a GPU has room for."""
        sizes, shapes = self.state.sizes, self.job.dataset.manifest.shapes
        if not sizes.chosen and sizes.are_free:
            most = measuring.rows_that_fit(self.job.backbone, self.state, self.sharding, batch, shapes)
            sizes.choose(most)
        self.state.guard.terms = term_names(sizes.objective)

    def _set_learning_rate(self) -> None:
        """Give the optimizer the learning rate of the step that begins."""
        self.state.optimizer.set_rate(self.job.stage.optimizer.rate(self.state.step, self.job.stage.steps))

    def _parts_by_update(self, batch: Batch) -> Iterator[tuple[Part, ...]]:
        """Yield, for each optimizer step, the part of the experience that each objective trains on.

        In a sum with groups, an objective that makes none gets one row of each group. One that takes a single
        optimizer step trains on its part again in each of the others' steps.
        """
        whole, ctx = self.state.sizes.objective, self._context()
        streams: list[Iterable[Part]] = []
        for index, each in enumerate(weighted_objectives(whole)):
            stride = whole.group_size // each.value.group_size
            rows = batch[::stride] if stride > 1 else batch
            stream = checked_parts(each.value, rows, self._bound(ctx, self._rng("experience", 0, rows, index), index))
            repeated = each.value.num_updates < whole.num_updates
            streams.append([*stream] * whole.num_updates if repeated else stream)
        with self._explain_exhaustion("the experience"):
            yield from zip(*streams, strict=True)

    def _accumulate(self, parts_of_update: tuple[Part, ...], update: int) -> tuple[Tensor, Tensor]:
        """Backpropagate each objective's part in micro-batches; return as `_gradients` yields."""
        import torch

        ctx, objectives = self._context(), weighted_objectives(self.state.sizes.objective)
        is_sum = len(objectives) > 1
        scale = ones = torch.ones((), device=self.ranks.device)
        no_items, terms_before = ones > 0, 0
        for index, (each, part) in enumerate(zip(objectives, parts_of_update, strict=True)):
            prefix = self._prefix(index)
            for name, values in part.metrics.items():
                self.state.means.add(prefix + name, values)
            count: float | Tensor = 0.0
            starts = range(0, len(part), ctx.micro_batch)
            for start in starts:
                micro_batch = part[start : start + ctx.micro_batch] if len(starts) > 1 else part
                bound = self._bound(ctx, self._rng("terms", update, micro_batch, index), index)
                is_last = start == starts[-1]
                count = count + self._backward(each.value, micro_batch, bound, prefix, terms_before, is_last=is_last)
            terms_before += each.value.num_terms
            with self._explain_exhaustion("the exchange of gradients"):
                self.retry.exchange()
            total = self._global_count(count)
            # DDP and FSDP2 give the mean of the ranks' gradients: times world, it is their sum
            scale = torch.where(total > 0, each.weight * self.ranks.world / total, 0)
            no_items = no_items & ~(total > 0)
            if is_sum:
                self.state.means.add(f"grad_norm/{each.name}", self.gradients.hold(scale))
                scale = ones
        return scale, no_items

    def _context(self) -> Context:
        """Return what objectives may use in the step in progress."""
        rows, first, step = self.state.sizes.rows, self._is_first_step, self.state.step
        return attrs.evolve(self.ctx, first=first, step=step, micro_batch=rows, gather=self.retry.gather)

    def _backward(
        self,
        objective: Objective[Any],
        micro_batch: Part,
        ctx: Context,
        prefix: str,
        terms_before: int,
        *,
        is_last: bool,
    ) -> float | Tensor:
        """Backpropagate each term as it is yielded, so that one graph lives at a time; return the number of items.

        A term's forward runs inside next(). Gradients are exchanged in the last term of the last micro-batch alone.

        prefix        put before the names of metrics
        terms_before  how many terms of other objectives come before these in the step
        """
        count: float | Tensor = 0.0
        terms = objective.terms(micro_batch, ctx)
        blame.require_result(terms, lambda it: isinstance(it, Iterator), objective, "terms()", "a generator of terms")
        number = objective.num_terms
        for index in range(number):
            exchanges = is_last and index == number - 1
            with self._explain_exhaustion(f"{prefix}term {index}"), self._gradient_exchange(exchanges):
                yielded = next(terms, None)
                blame.require(yielded is not None, objective, f"yielded {index} terms, not num_terms = {number}")
                term = contract.term(yielded, objective)
                del yielded  # it would keep the graph alive
                self.ranks.accelerator.backward(term.total)
            self.state.guard.check(term.total.detach(), self.state.step, terms_before + index)
            for name, values in term.metrics.items():
                self.state.means.add(prefix + name, values)
            count = count + term.count
            del term
        blame.require(next(terms, None) is None, objective, f"yields more than num_terms = {number} terms")
        return count

    def _gradient_exchange(self, exchanges: bool) -> Any:
        """Let gradients be exchanged only where `exchanges`; FSDP2 does it in each backward where it keeps shards.

        As long as the ranks agree first, DDP exchanges nothing: a rank that ran out of memory would never join in.
        """
        self.sharding.exchange(exchanges)
        if self.ranks.sharded or (exchanges and not self.retry.agrees):
            return nullcontext()
        return self.ranks.accelerator.no_sync(self.state.transformer)

    def _global_count(self, count: float | Tensor) -> Tensor:
        """Add up `count` over all ranks, and make a fault that one of them found a fault of all."""
        import torch

        mine = torch.as_tensor(count, dtype=torch.float32, device=self.ranks.device)
        total, faults = self.ranks.all_reduce(torch.stack([mine, self.state.guard.found.float()]))
        self.state.guard.found = faults > 0
        return total / self.ranks.layout.context  # ranks that share samples counted the same items

    def _apply_gradient(self, scale: Tensor, no_items: Tensor) -> None:
        """Multiply the gradient by `scale` [], clip it and take the optimizer's step, without a wait for the device.

        Where `no_items` (bool []), or where a loss or gradient of any rank was not finite, the optimizer leaves every
        weight as it is.
        """
        norm = self.gradients.norm() * scale
        self.state.guard.check(norm, self.state.step, -1)
        limit = self.job.stage.max_grad_norm
        self.gradients.multiply(scale * (limit / (norm + 1e-6)).clamp(max=1))
        skipped = self.state.guard.end_update()
        unchanged = skipped | no_items
        self.sharding.release()
        self.state.optimizer.take(unchanged)
        if self.state.ema:
            self.state.ema.update(self.state.trainable, unchanged)
        self.state.means.add("grad_norm", norm)
        self.state.means.end_update(skipped)

    def _skipped_too_many(self) -> bool:
        """Skip the optimizer step in progress; return whether the stage has now skipped more than it may."""
        guard = self.state.guard
        guard.found = guard.found | True
        self.state.means.end_update(guard.end_update())
        return bool(guard.exceeded)

    def _rng(self, purpose: str, update: int, part: Part, objective: int) -> Rng:
        """Return the randomness of an objective; the first one of a sum draws what it would draw alone."""
        rng = Rng((self.job.seed, self.job.stage.name, self.state.step, purpose, update), part.rows, drawn=self._draws)
        return rng.of(f"summand {objective}") if objective else rng

    def _prefix(self, objective: int) -> str:
        """Return what the names of an objective's metrics begin with: its own name in a sum."""
        objectives = weighted_objectives(self.job.stage.objective)
        return f"{objectives[objective].name}/" if len(objectives) > 1 else ""

    def _bound(self, ctx: Context, rng: Rng, objective: int) -> Context:
        """Return the context of one call of an objective: its randomness, and where its held-out scores are logged."""
        prefix, means = self._prefix(objective), self.state.means
        return attrs.evolve(ctx, rng=rng, report=lambda name, values: means.add(prefix + name, values))

    def _explain_exhaustion(self, what: str) -> AbstractContextManager[None]:
        """Say in which stage and step memory ran out, while `what` was computed."""
        return reporting.explain_exhaustion(self.job, self.state, self.sharding.gather, what)

    def report_start(self) -> None:
        """Report to the listener that training starts, from the weights that the network now has."""
        with self.state.ema_applied():
            self.job.listener.started(self.state.step)

    def report_step(self) -> None:
        """Report a step to the listener; where it is logged, with means over all ranks and steps since the last log.

        Logged steps are the only ones that wait for the device.
        """
        step, listener = self.state.step, self.job.listener
        stage, state, ranks = self.job.stage, self.state, self.ranks
        metrics = reporting.take_metrics(stage, state, ranks) if stage.reports(step) else {}
        alarm = reporting.alarm(state, metrics, ranks) if metrics else ""
        metrics = {**metrics, "alarm": 1.0} if alarm else metrics
        listener.stepped(step, metrics)
        if metrics:
            with self.state.ema_applied():
                listener.logged(step, metrics)
        if alarm:
            listener.alarmed(alarm)

    @property
    def ended_by(self) -> str:
        """The alarm that ended the stage before its last step, "" if none did."""
        return self.state.watch.ended if self.state.watch else ""

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or an alarm has ended the stage."""
        return self.state.step >= self.job.stage.steps or bool(self.ended_by)

    def checkpoint_is_due(self) -> bool:
        """Whether the step just finished is one after which the stage writes a checkpoint; the last one always is."""
        return self.finished or self.state.step % self.job.stage.checkpoint_every == 0

    def save(self) -> int:
        """Write a checkpoint of the step just finished, and return the step's number."""
        path = self.state.save(self.job.identity, self.job.stage.keep)
        if path:
            with self.state.ema_applied():
                self.job.listener.saved(self.state.step, path)
        self.ranks.barrier()
        return self.state.step

    def finish(self) -> Cost:
        """Unwrap the network and give it the final weights: the average, where the stage keeps one."""
        state, ranks, backbone = self.state, self.ranks, self.job.backbone
        state.refuse_non_finite()
        if self.ended_by:
            self.job.listener.ended(state.step, self.ended_by)
        backbone.transformer = ranks.accelerator.unwrap_model(state.transformer)
        ranks.accelerator.free_memory()
        self.sharding.free()  # sampling leaves the weights of the root module gathered
        for name, average in state.ema.average.items() if state.ema else ():
            state.trainable[name].data.copy_(average)
        rows = self.job.stage.rows * state.step
        return Cost(state.seconds, rows / max(state.seconds, 1e-9), memory.peak(ranks.device))
