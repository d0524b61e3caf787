"""The only training loop.

A step: one batch -> the objective's experience -> for each of its parts, micro-batches -> terms, each
backpropagated and freed as it is yielded -> one division by the global count -> one optimiser step.
Where the objective is a sum, all but the optimiser step is done for each of its objectives.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from attrs import define, frozen

from corefit.data import loader
from corefit.data.dataset import Dataset
from corefit.data.order import BatchSampler, Order
from corefit.errors import NonFinite, Stopped
from corefit.plugins import contract
from corefit.rng import Rng
from corefit.rollout.noise import LogitNormal
from corefit.rollout.samplers import Ode
from corefit.system import memory
from corefit.system.ranks import Ranks
from corefit.train import remedies, weights
from corefit.train.gradients import Gradients
from corefit.train.meters import NonFiniteGuard
from corefit.train.state import State
from corefit.types import Backbone, Batch, Weighted, blame
from corefit.types.objective import Context, Objective, Part, parts, summands, term_names
from corefit.types.stage import Full, Lora, Stage

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

Metrics = Mapping[str, float]


class Listener(ABC):
    """What training tells of itself, and asks after each step."""

    @abstractmethod
    def stopping(self) -> bool:
        """Whether to write a checkpoint now and raise Stopped; one rank's yes is enough."""

    @abstractmethod
    def stepped(self, step: int, metrics: Metrics) -> None:
        """Hear of a step that is done; with its metrics where they are logged, with none otherwise."""

    @abstractmethod
    def started(self, step: int) -> None:
        """Hear that training starts at `step`. The network has the weights that the stage would leave now."""

    @abstractmethod
    def logged(self, step: int, metrics: Metrics) -> None:
        """Hear of a logged step. The network has the weights that the stage would leave now."""

    @abstractmethod
    def saved(self, step: int, path: Path) -> None:
        """Hear that `path` is a whole checkpoint. The network has the weights that the stage would leave now."""


class Silence(Listener):
    """Hears nothing and never asks training to stop."""

    def stopping(self) -> bool:
        return False

    def stepped(self, step: int, metrics: Metrics) -> None:
        pass

    def started(self, step: int) -> None:
        pass

    def logged(self, step: int, metrics: Metrics) -> None:
        pass

    def saved(self, step: int, path: Path) -> None:
        pass


@frozen(kw_only=True, eq=False)
class Job:
    """All that one stage's training is given."""

    stage: Stage
    mode: Full | Lora
    seed: int
    backbone: Backbone
    dataset: Dataset
    order: Order
    folder: Path
    """The stage's own folder; checkpoints go to `checkpoints/` in it."""
    listener: Listener
    """Hears how training goes, and may ask it to stop."""
    identity: str = ""
    """Hash of what determines the stage's weights; its checkpoints carry it."""
    adapter: Path | None = None
    """The LoRA that the stage before left, if it left one."""
    half: bool = False
    """Whether weights that do not train are held in bfloat16."""


@frozen
class Cost:
    """What training took.

    seconds             of steps
    samples_per_second  over all ranks
    peak_memory         bytes of one rank
    survived            share of the weights that training moved which differ from the start as they were saved; None
                        where they were saved as they were trained
    """

    seconds: float
    samples_per_second: float
    peak_memory: int
    survived: float | None = None


def train(job: Job, ranks: Ranks) -> Cost:
    """Run a stage's steps from its newest checkpoint on; the backbone ends with the final weights, sharded as it was.

    Raises NonFinite before a weight is touched by a non-finite loss or gradient, and Stopped.
    """
    helps = remedies.weights_helps(job.mode, ranks.world, sharded=ranks.sharded)
    with memory.explain_exhaustion(f"stage {job.stage.name}, loading the weights", helps):
        loop = Loop.build(job, ranks)
        loop.state.resume(job.stage.keep)
    with loop.state.to_be_left():
        job.listener.started(loop.state.step)
    with closing(loop.batches()) as batches:
        for batch in batches if loop.state.step < job.stage.steps else ():
            loop.take_step(batch)
            loop.report()
            step = loop.state.step
            last = step == job.stage.steps
            if ranks.any(job.listener.stopping()):
                raise Stopped(loop.save())
            if last or step % job.stage.checkpoint_every == 0:
                loop.save()
            if last:
                break
    return loop.finish()


@define(eq=False, kw_only=True)
class Loop:
    """A stage in training: what it is given, what its objective may touch, and where it stands."""

    job: Job
    ranks: Ranks
    summands: tuple[Weighted[Objective[Any]], ...]
    ctx: Context
    gradients: Gradients
    state: State
    _first: bool = True

    @staticmethod
    def build(job: Job, ranks: Ranks) -> Loop:
        """Load the weights that train, and put everything on the device."""

        stage, backbone, device = job.stage, job.backbone, ranks.device
        trainable = weights.load(backbone, ranks, half=job.half, adapter=job.adapter, mode=job.mode, seed=job.seed)
        backbone.empty = job.dataset.null.to(device)
        uses = stage.objective.uses
        ctx = Context(
            backbone=backbone,
            sampler=stage.sampler or Ode(),
            noise=stage.noise or LogitNormal(),
            rng=Rng((job.seed, stage.name), []),
            rewards=stage.reward,
            reference=weights.reference(backbone, trainable) if "reference" in uses else None,
            micro_batch=stage.micro_batch or stage.rows,
            gather=ranks.all_gather,
        )
        # sharded, it only gets autocast; otherwise DDP as well
        backbone.transformer = ranks.accelerator.prepare_model(backbone.transformer, evaluation_mode=ranks.sharded)
        state = State(
            stage=stage.name,
            folder=job.folder / "checkpoints",
            ranks=ranks,
            transformer=backbone.transformer,
            trainable=trainable,
            optimizer=_optimizer(stage, trainable),
            ema=weights.Ema.of(trainable, stage.ema) if stage.ema is not None else None,
            guard=NonFiniteGuard.none(device, term_names(stage.objective), stage.skips),
        )
        gradients = Gradients(trainable, ranks)
        return Loop(job=job, ranks=ranks, summands=summands(stage.objective), ctx=ctx, gradients=gradients, state=state)

    def batches(self) -> Generator[Batch, None, None]:
        """This rank's share of each step's batch, from the next step on."""
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
            rank=self.ranks.rank,
            world=self.ranks.world,
            device=self.ranks.device,
        )

    def take_step(self, batch: Batch) -> None:
        """One batch: experience, then an optimiser step on each of its parts."""
        started = time.perf_counter()
        stage = self.job.stage
        ctx = attrs.evolve(self.ctx, first=self._first)
        drawn: list[float] | None = [] if self._first and self.ranks.world > 1 else None
        for group in self.state.optimizer.param_groups:
            group["lr"] = stage.optimizer.rate(self.state.step, stage.steps)
        try:
            for update, each in enumerate(self._experience(batch, ctx, drawn)):
                self._update(update, each, ctx, drawn)
        except NonFinite:  # of an experience, which no weight has seen
            if self._too_many_skipped():
                raise
        if drawn is not None:
            self.ranks.refuse_same_noise(drawn, stage.name)
        self.state.step += 1
        if self.ranks.device.type == "cpu":
            self.state.guard.refuse(stage.name, self.ranks)
        elapsed = time.perf_counter() - started
        self.state.seconds += elapsed
        self.state.unreported = (self.state.unreported[0] + stage.rows, self.state.unreported[1] + elapsed)
        self._first = False

    def _memory(self, what: str) -> AbstractContextManager[None]:
        """Say in which stage and step memory ran out, while `what` was computed."""
        job, ranks = self.job, self.ranks
        helps = remedies.step_helps(job.stage, job.mode, job.backbone, ranks.world, sharded=ranks.sharded)
        return memory.explain_exhaustion(
            f"stage {job.stage.name}, step {self.state.step + 1}, {what}", helps, remedies.KEPT
        )

    def _too_many_skipped(self) -> bool:
        """Count a skipped step, and whether it was one too many."""
        self.state.guard.now = self.state.guard.now | True
        self.state.means.settle(self.state.guard.settle())
        return bool(self.state.guard.over)

    def _experience(self, batch: Batch, ctx: Context, drawn: list[float] | None) -> Iterator[tuple[Part, ...]]:
        """What each optimiser step trains on, a part for each summand."""
        whole = self.job.stage.objective
        streams: list[Iterable[Part]] = []
        for index, each in enumerate(self.summands):
            every = whole.group_size // each.value.group_size
            rows = batch[::every] if every > 1 else batch
            made = parts(each.value, rows, ctx.at(self._rng("experience", 0, rows, drawn, index)))
            once = each.value.num_updates < whole.num_updates
            streams.append([*made] * whole.num_updates if once else made)
        with self._memory("the experience"):
            yield from zip(*streams, strict=True)

    @property
    def _several(self) -> bool:
        """Whether objectives are added up."""
        return len(self.summands) > 1

    def _update(self, update: int, parts: tuple[Part, ...], ctx: Context, drawn: list[float] | None) -> None:
        """Backward over the micro-batches of each part, then one optimiser step."""
        import torch

        scale = ones = torch.ones((), device=self.ranks.device)
        idle, terms = ones > 0, 0
        for index, (each, part) in enumerate(zip(self.summands, parts, strict=True)):
            label = f"{each.name}/" if self._several else ""
            for name, values in part.metrics.items():
                self.state.means.add(label + name, values)
            count: float | Tensor = 0.0
            firsts = range(0, len(part), ctx.micro_batch)
            for first in firsts:
                piece = part[first : first + ctx.micro_batch] if len(firsts) > 1 else part
                bound = ctx.at(self._rng("terms", update, piece, drawn, index))
                count = count + self._backward(each.value, piece, bound, label, terms, last=first == firsts[-1])
            terms += each.value.num_terms
            total = self._agreed_count(count)
            scale, idle = torch.where(total > 0, each.weight * self.ranks.world / total, 0), idle & ~(total > 0)
            if self._several:
                self.state.means.add(f"grad_norm/{each.name}", self.gradients.hold(scale))
                scale = ones
        with self._memory("the optimizer's step"):
            self.gradients.merge()
            self._apply(scale, idle)

    def _backward(
        self, objective: Objective[Any], part: Part, ctx: Context, label: str, before: int, *, last: bool
    ) -> float | Tensor:
        """Backward on each term as it is yielded, so that one graph lives at a time; the items there were.

        A term's forward runs inside next(): all but the last one of an objective run without gradient exchange.
        `label` is put before the names of metrics; `before` terms of other objectives came before these.
        """
        count: float | Tensor = 0.0
        terms = objective.terms(part, ctx)
        blame.returned(terms, lambda it: isinstance(it, Iterator), objective, "terms()", "a generator of terms")
        number = objective.num_terms
        for index in range(number):
            with self._memory(f"{label}term {index}"), self._exchange(last and index == number - 1):
                made = next(terms, None)
                blame.expect(made is not None, objective, f"yielded {index} terms, not num_terms = {number}")
                term = contract.term(made, objective)
                del made  # or its graph would live on
                self.ranks.accelerator.backward(term.total)
            self.state.guard.see(term.total.detach(), self.state.step, before + index)
            for name, values in term.metrics.items():
                self.state.means.add(label + name, values)
            count = count + term.count
            del term
        blame.expect(next(terms, None) is None, objective, f"yields more than num_terms = {number} terms")
        return count

    def _exchange(self, now: bool) -> Any:
        """DDP adds gradients up in a step's last backward alone; FSDP2 in each, for it keeps none in full."""
        return nullcontext() if now or self.ranks.sharded else self.ranks.accelerator.no_sync(self.state.transformer)

    def _apply(self, scale: Tensor, idle: Tensor) -> None:
        """Multiply by `scale` [], clip, step unless there is nothing to learn (`idle`, bool []); all on the device.

        A non-finite loss or gradient on any rank makes the fused optimiser leave every weight as it is.
        """
        norm = self.gradients.norm() * scale
        self.state.guard.see(norm, self.state.step, -1)
        limit = self.job.stage.max_grad_norm
        self.gradients.multiply(scale * (limit / (norm + 1e-6)).clamp(max=1))
        skipped = self.state.guard.settle()
        idle = skipped | idle
        self.state.optimizer.found_inf = idle.float()  # pyright: ignore[reportAttributeAccessIssue]
        self.state.optimizer.step()
        self.state.optimizer.zero_grad(set_to_none=True)
        if self.state.ema:
            self.state.ema.update(self.state.trainable, idle)
        self.state.means.add("grad_norm", norm)
        self.state.means.settle(skipped)

    def _agreed_count(self, count: float | Tensor) -> Tensor:
        """Items of all ranks; a fault that one of them saw is then a fault of all."""
        import torch

        mine = torch.as_tensor(count, dtype=torch.float32, device=self.ranks.device)
        total, faults = self.ranks.all_reduce(torch.stack([mine, self.state.guard.now.float()]))
        self.state.guard.now = faults > 0
        return total

    def _rng(self, purpose: str, update: int, part: Part, drawn: list[float] | None, summand: int) -> Rng:
        """The first of several objectives draws what it would draw alone."""
        rng = Rng((self.job.seed, self.job.stage.name, self.state.step, purpose, update), part.rows, drawn=drawn)
        return rng.of(f"summand {summand}") if summand else rng

    def report(self) -> None:
        """Tell the listener of a step, with means over all ranks since the last report where the step is logged.

        A logged step is the only one that waits for the device.
        """
        step, listener = self.state.step, self.job.listener
        metrics = self._metrics() if self.job.stage.reports(step) else {}
        listener.stepped(step, metrics)
        if metrics:
            with self.state.to_be_left():
                listener.logged(step, metrics)

    def _metrics(self) -> Metrics:
        stage, state = self.job.stage, self.state
        state.guard.refuse(stage.name, self.ranks)
        samples, seconds = state.unreported
        state.unreported = (0, 0.0)
        return {
            **state.means.take(self.ranks),
            **({"skipped": float(state.guard.skipped)} if stage.skips else {}),
            "lr": stage.optimizer.rate(state.step - 1, stage.steps),
            "samples_per_second": samples / max(seconds, 1e-9),
            "seconds": state.seconds,
        }

    def save(self) -> int:
        """Write a checkpoint of the step just finished; its number."""
        path = self.state.save(self.job.identity, self.job.stage.keep)
        if path:
            with self.state.to_be_left():
                self.job.listener.saved(self.state.step, path)
        self.ranks.barrier()
        return self.state.step

    def finish(self) -> Cost:
        """Leave the final weights, averaged where the stage averages, in the unwrapped model, sharded as it was."""
        state, ranks, backbone = self.state, self.ranks, self.job.backbone
        state.refuse_spoiled()
        backbone.transformer = ranks.accelerator.unwrap_model(state.transformer)
        ranks.accelerator.free_memory()
        if ranks.sharded:
            backbone.transformer.reshard()  # after sampling, its own weights are whole
        for name, average in state.ema.average.items() if state.ema else ():
            state.trainable[name].data.copy_(average)
        rows = self.job.stage.rows * state.step
        return Cost(state.seconds, rows / max(state.seconds, 1e-9), memory.peak(ranks.device))


def _optimizer(stage: Stage, trainable: weights.Trainable) -> Optimizer:
    import torch

    keys = stage.optimizer
    return torch.optim.AdamW(
        list(trainable.values()),
        lr=keys.lr,
        betas=keys.betas,
        eps=keys.eps,
        weight_decay=keys.weight_decay,
        fused=True,
    )
