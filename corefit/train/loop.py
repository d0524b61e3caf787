"""The only training loop.

A step: one batch -> the objective's experience -> for each of its parts, micro-batches -> terms, each
backpropagated and freed as it is yielded -> one division by the global count -> one optimiser step.
Where the objective is a sum, all but the optimiser step is done for each of its objectives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from attrs import define, field, frozen

from corefit.data import loader
from corefit.data.dataset import Dataset
from corefit.data.order import Order, Walk
from corefit.errors import NonFinite, Stopped, TrainingError
from corefit.plugins import contract
from corefit.rng import Rng
from corefit.rollout.noise import LogitNormal
from corefit.rollout.samplers import Ode
from corefit.system import memory
from corefit.system.ranks import Ranks
from corefit.train import checkpoint, remedies, weights
from corefit.train.gradients import Gradients
from corefit.train.meters import Fault, Means
from corefit.types import Backbone, Batch, Weighted, blame
from corefit.types.objective import Context, Objective, Part, parts, summands, term_names
from corefit.types.stage import Full, Lora, Stage

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.optim import Optimizer

Metrics = Mapping[str, float]


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
    identity: str = ""
    """Hash of what determines the stage's weights; its checkpoints carry it."""
    adapter: Path | None = None
    """The LoRA that the stage before left, if it left one."""
    half: bool = False
    """Whether weights that do not train are held in bfloat16."""
    stop: Callable[[], bool] = lambda: False
    """Asked after each step: whether to write a checkpoint and raise Stopped; one rank's yes is enough."""
    stepped: Callable[[int, Metrics], None] = lambda step, metrics: None
    """Told of every step, with the metrics of a logged one and none otherwise."""
    started: Callable[[int], None] = lambda step: None
    logged: Callable[[int, Metrics], None] = lambda step, metrics: None
    saved: Callable[[int, Path], None] = lambda step, path: None
    """These three are told while the network has the weights that the stage would leave now: see `Loop.shown`."""


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
        loop.resume()
    with loop.shown():
        job.started(loop.step)
    with closing(loop.batches()) as batches:
        for batch in batches if loop.step < job.stage.steps else ():
            loop.take_step(batch)
            metrics = loop.report() if job.stage.reports(loop.step) else {}
            job.stepped(loop.step, metrics)
            if metrics:
                with loop.shown():
                    job.logged(loop.step, metrics)
            last = loop.step == job.stage.steps
            if ranks.any(job.stop()):
                raise Stopped(loop.save())
            if last or loop.step % job.stage.checkpoint_every == 0:
                loop.save()
            if last:
                break
    return loop.finish()


@define(eq=False, kw_only=True)
class Loop:
    """A stage in training. What a checkpoint holds: step, seconds, weights, ema, optimizer, means."""

    job: Job
    ranks: Ranks
    summands: tuple[Weighted[Objective[Any]], ...]
    ctx: Context
    # what trains
    transformer: torch.nn.Module
    named: weights.Named
    gradients: Gradients
    optimizer: Optimizer
    ema: weights.Ema | None
    # where it stands
    step: int = 0
    seconds: float = 0.0
    means: Means = field(factory=lambda: Means())
    fault: Fault
    _since: tuple[int, float] = (0, 0.0)
    _first: bool = True

    @staticmethod
    def build(job: Job, ranks: Ranks) -> Loop:
        """Load the weights that train, and put everything on the device."""
        import torch

        stage, backbone, device = job.stage, job.backbone, ranks.device
        named = weights.load(backbone, ranks, half=job.half, adapter=job.adapter, mode=job.mode, seed=job.seed)
        backbone.empty = job.dataset.null.to(device)
        uses = stage.objective.uses
        ctx = Context(
            backbone=backbone,
            sampler=stage.sampler or Ode(),
            noise=stage.noise or LogitNormal(),
            rng=Rng((job.seed, stage.name), []),
            rewards=stage.reward,
            reference=weights.reference(backbone, named) if "reference" in uses else None,
            micro_batch=stage.micro_batch or stage.rows,
            gather=ranks.gathered,
        )
        # sharded, it only gets autocast; otherwise DDP as well
        backbone.transformer = ranks.accelerator.prepare_model(backbone.transformer, evaluation_mode=ranks.sharded)
        rate = stage.optimizer
        return Loop(
            job=job,
            ranks=ranks,
            summands=summands(stage.objective),
            ctx=ctx,
            transformer=backbone.transformer,
            named=named,
            gradients=Gradients(named, ranks),
            optimizer=torch.optim.AdamW(
                list(named.values()),
                lr=rate.lr,
                betas=rate.betas,
                eps=rate.eps,
                weight_decay=rate.weight_decay,
                fused=True,
            ),
            ema=weights.Ema.of(named, stage.ema) if stage.ema is not None else None,
            fault=Fault.none(device, term_names(stage.objective), stage.skips),
        )

    def batches(self) -> Generator[Batch, None, None]:
        """This rank's share of each step's batch, from the next step on."""
        stage, dataset = self.job.stage, self.job.dataset
        walk = Walk(
            buckets=list(dataset.buckets.values()),
            batch=stage.rows,
            group=stage.objective.rows_per_prompt,
            seed=self.job.seed,
            stage=stage.name,
            order=self.job.order,
        )
        return loader.batches(
            dataset,
            walk,
            start=self.step,
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
        for group in self.optimizer.param_groups:
            group["lr"] = stage.optimizer.rate(self.step, stage.steps)
        try:
            for update, each in enumerate(self._experience(batch, ctx, drawn)):
                self._update(update, each, ctx, drawn)
        except NonFinite:  # of an experience, which no weight has seen
            if self._too_many_skipped():
                raise
        if drawn is not None:
            self.ranks.refuse_same_noise(drawn, stage.name)
        self.step += 1
        if self.ranks.device.type == "cpu":
            self.fault.refuse(stage.name, self.ranks)
        elapsed = time.perf_counter() - started
        self.seconds += elapsed
        self._since = (self._since[0] + stage.rows, self._since[1] + elapsed)
        self._first = False

    def _memory(self, what: str) -> AbstractContextManager[None]:
        """Say in which stage and step memory ran out, while `what` was computed."""
        job, ranks = self.job, self.ranks
        helps = remedies.step_helps(job.stage, job.mode, job.backbone, ranks.world, sharded=ranks.sharded)
        return memory.explain_exhaustion(f"stage {job.stage.name}, step {self.step + 1}, {what}", helps, remedies.KEPT)

    def _too_many_skipped(self) -> bool:
        """Count a skipped step, and whether it was one too many."""
        self.fault.now = self.fault.now | True
        self.means.settle(self.fault.settle())
        return bool(self.fault.over)

    def _experience(self, batch: Batch, ctx: Context, drawn: list[float] | None) -> Iterator[tuple[Part, ...]]:
        """What each optimiser step trains on, a part for each summand."""
        whole = self.job.stage.objective
        streams: list[Iterable[Part]] = []
        for index, each in enumerate(self.summands):
            every = whole.rows_per_prompt // each.value.rows_per_prompt
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
                self.means.add(label + name, values)
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
                self.means.add(f"grad_norm/{each.name}", self.gradients.hold(scale))
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
            self.fault.see(term.total.detach(), self.step, before + index)
            for name, values in term.metrics.items():
                self.means.add(label + name, values)
            count = count + term.count
            del term
        blame.expect(next(terms, None) is None, objective, f"yields more than num_terms = {number} terms")
        return count

    def _exchange(self, now: bool) -> Any:
        """DDP adds gradients up in a step's last backward alone; FSDP2 in each, for it keeps none in full."""
        return nullcontext() if now or self.ranks.sharded else self.ranks.accelerator.no_sync(self.transformer)

    def _apply(self, scale: Tensor, idle: Tensor) -> None:
        """Multiply by `scale` [], clip, step unless there is nothing to learn (`idle`, bool []); all on the device.

        A non-finite loss or gradient on any rank makes the fused optimiser leave every weight as it is.
        """
        norm = self.gradients.norm() * scale
        self.fault.see(norm, self.step, -1)
        limit = self.job.stage.max_grad_norm
        self.gradients.multiply(scale * (limit / (norm + 1e-6)).clamp(max=1))
        skipped = self.fault.settle()
        idle = skipped | idle
        self.optimizer.found_inf = idle.float()  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.named, idle)
        self.means.add("grad_norm", norm)
        self.means.settle(skipped)

    def _agreed_count(self, count: float | Tensor) -> Tensor:
        """Items of all ranks; a fault that one of them saw is then a fault of all."""
        import torch

        mine = torch.as_tensor(count, dtype=torch.float32, device=self.ranks.device)
        total, faults = self.ranks.summed(torch.stack([mine, self.fault.now.float()]))
        self.fault.now = faults > 0
        return total

    def _rng(self, purpose: str, update: int, part: Part, drawn: list[float] | None, summand: int) -> Rng:
        """The first of several objectives draws what it would draw alone."""
        rng = Rng((self.job.seed, self.job.stage.name, self.step, purpose, update), part.rows, drawn=drawn)
        return rng.of(f"summand {summand}") if summand else rng

    def report(self) -> Metrics:
        """Means over all ranks since the last report; the only place of a step that waits for the device."""
        stage = self.job.stage
        self.fault.refuse(stage.name, self.ranks)
        samples, seconds = self._since
        self._since = (0, 0.0)
        return {
            **self.means.take(self.ranks),
            **({"skipped": float(self.fault.skipped)} if stage.skips else {}),
            "lr": stage.optimizer.rate(self.step - 1, stage.steps),
            "samples_per_second": samples / max(seconds, 1e-9),
            "seconds": self.seconds,
        }

    def shown(self) -> AbstractContextManager[None]:
        """Within it the network has the weights that the stage would leave now: the average, where there is one."""
        return self.ema.shown(self.transformer, self.named) if self.ema else nullcontext()

    def finish(self) -> Cost:
        """Leave the final weights, averaged where the stage averages, in the unwrapped model, sharded as it was."""
        self._refuse_spoilt()
        backbone, ranks = self.job.backbone, self.ranks
        backbone.transformer = ranks.accelerator.unwrap_model(self.transformer)
        ranks.accelerator.free_memory()
        if ranks.sharded:
            backbone.transformer.reshard()  # after sampling, its own weights are whole
        for name, average in self.ema.average.items() if self.ema else ():
            self.named[name].data.copy_(average)
        rows = self.job.stage.rows * self.step
        return Cost(self.seconds, rows / max(self.seconds, 1e-9), memory.peak(ranks.device))

    def save(self) -> int:
        """Write a checkpoint of the step just finished; never one of spoilt weights."""
        self._refuse_spoilt()
        means = self.means.by_rank(self.ranks)
        if self.ranks.main or self.ranks.sharded:
            tensors = {**self._tensors(), **{f"means/{name}": t for name, t in means.items()}}
            info = {"seconds": self.seconds, "since": list(self._since), "identity": self.job.identity}
            holders = self.ranks if self.ranks.sharded else None
            path = checkpoint.save(self._checkpoints, self.step, tensors, info, self.job.stage.keep, holders)
            with self.shown():
                self.job.saved(self.step, path)
        self.ranks.wait()
        return self.step

    @property
    def _checkpoints(self) -> Path:
        return self.job.folder / "checkpoints"

    def _refuse_spoilt(self) -> None:
        """NonFinite where training went wrong, TrainingError where weights are not finite: such are never saved."""
        import torch

        name = self.job.stage.name
        self.fault.refuse(name, self.ranks)
        held = weights.local([*self.named.values(), *(self.ema.average.values() if self.ema else ())])
        fine = bool(torch.stack([t.isfinite().all() for t in held]).all())
        if self.ranks.any(not fine):
            raise TrainingError(
                f"stage {name}: the weights after step {self.step} are not finite and are not saved; the checkpoints "
                f"in {self._checkpoints} are good. Lower optimizer.lr and run again"
            )

    def _tensors(self) -> dict[str, Tensor]:
        """What of a checkpoint is equal on all ranks, or a rank's shards of it."""
        tensors: dict[str, Tensor] = {f"weights/{name}": p for name, p in self.named.items()}
        for name, parameter in self.named.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer/{key}/{name}"] = value
        if self.ema:
            tensors |= {f"ema/{name}": t for name, t in self.ema.average.items()}
        return {**tensors, "fault/skipped": self.fault.skipped}

    def resume(self) -> None:
        """Continue from the newest whole checkpoint, if there is one."""
        import torch

        if self.ranks.main:
            checkpoint.sweep(self._checkpoints)
        self.ranks.wait()
        found, damaged = checkpoint.latest(self._checkpoints, self.ranks)
        for message in damaged:
            self.ranks.accelerator.print(message)
        if found is None:
            return
        shapes = found.shapes()
        self._expect_optimizer(shapes)
        names = [name for name in shapes if name.startswith("means/")]
        means = {name: torch.zeros(shapes[name], dtype=torch.float64) for name in names}
        found.read({**self._tensors(), **means})
        if self.ranks.main:
            checkpoint.prune(self._checkpoints, self.job.stage.keep)  # what a killed process did not come to remove
        self.step, self.seconds = found.step, found.info["seconds"]
        self._since = (found.info["since"][0], found.info["since"][1])
        self.means.restore({name.removeprefix("means/"): t for name, t in means.items()}, self.ranks)

    def _expect_optimizer(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Room for the optimiser's state, which torch makes in its first step."""
        import torch

        for name, shape in shapes.items():
            kind, _, rest = name.partition("/")
            if kind == "optimizer":
                key, _, weight = rest.partition("/")
                like = self.named[weight]
                value = torch.zeros_like(like) if shape else torch.zeros((), device=like.device)
                self.optimizer.state[like][key] = value.detach()
