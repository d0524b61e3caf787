"""The only training loop. accelerate lives here and nowhere else.

A step: one batch -> the objective's experience -> for each of its parts, micro-batches -> terms, each
backpropagated and freed as it is yielded -> one division by the global count -> one optimiser step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from attrs import define, field, frozen

from corefit import data, memory, state, weights
from corefit.data import Dataset, Order
from corefit.meters import Fault, Means, summed
from corefit.objective import Context, Part
from corefit.rng import Rng
from corefit.stage import Full, Lora, Stage
from corefit.types import Backbone, Batch, Term

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor
    from torch.optim import Optimizer

Metrics = Mapping[str, float]


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop; the checkpoint of `step` is written."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


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
    adapter: Path | None = None
    """The LoRA that the stage before left, if it left one."""
    stop: Callable[[], bool] = lambda: False
    """Asked after each step: whether to write a checkpoint and raise Stopped."""
    stepped: Callable[[int, Metrics], None] = lambda step, metrics: None
    """Told of every step, with the metrics of a logged one and none otherwise."""
    started: Callable[[int], None] = lambda step: None
    logged: Callable[[int, Metrics], None] = lambda step, metrics: None
    saved: Callable[[int, Path], None] = lambda step, path: None


@frozen
class Cost:
    """What training took: seconds of steps, samples a second over all ranks, peak memory in bytes of one rank."""

    seconds: float
    samples_per_second: float
    peak_memory: int


def accelerator(precision: str) -> Accelerator:
    """The process's accelerator; precision is "fp32", "bf16", or "auto" (bf16 where a GPU has it)."""
    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs

    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    made = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", kwargs_handlers=[ddp])
    if made.device.type == "cpu":
        memory.keep_freed()
    return made


def train(job: Job, accelerator: Accelerator) -> Cost:
    """Run a stage's steps from its newest checkpoint on; the backbone ends with the stage's final weights.

    Raises TrainingError before a weight is touched by a non-finite loss or gradient, and Stopped.
    """
    loop = Loop.build(job, accelerator)
    loop.resume()
    job.started(loop.step)
    with closing(loop.batches()) as batches:
        for batch in batches:
            loop.take_step(batch)
            metrics = loop.report() if loop.step == job.stage.steps or loop.step % job.stage.log_every == 0 else {}
            job.stepped(loop.step, metrics)
            if metrics:
                job.logged(loop.step, metrics)
            if job.stop():
                raise Stopped(loop.save())
            if loop.step == job.stage.steps:
                break
            if loop.step % job.stage.checkpoint_every == 0:
                loop.save()
    return loop.finish()


@define(eq=False, kw_only=True)
class Loop:
    """A stage in training. What a checkpoint holds: step, seconds, weights, ema, optimizer, means."""

    job: Job
    accelerator: Accelerator
    objective: Any
    ctx: Context
    # what trains
    transformer: torch.nn.Module
    named: weights.Named
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
    def build(job: Job, accelerator: Accelerator) -> Loop:
        """Load the weights that train, and put everything on the device."""
        import torch

        stage, backbone, device = job.stage, job.backbone, accelerator.device
        half = accelerator.mixed_precision == "bf16" and isinstance(job.mode, Lora)
        backbone.load(device, torch.bfloat16 if half else torch.float32)
        if job.adapter:
            backbone.load_lora(job.adapter)
        named = weights.trainable(backbone, job.mode)
        if isinstance(job.mode, Lora) and not job.adapter:
            weights.seeded_adapter(named, job.seed)
        backbone.empty = job.dataset.null.to(device)
        uses = stage.objective.uses
        ctx = Context(
            backbone=backbone,
            sampler=stage.sampler_or_default(),
            noise=stage.noise_or_default(),
            rng=Rng((job.seed, stage.name), []),
            rewards=stage.reward,
            reference=weights.reference(backbone, named) if "reference" in uses else None,
            micro_batch=stage.micro_batch or stage.rows,
            gather=_gatherer(accelerator),
        )
        backbone.transformer = accelerator.prepare_model(backbone.transformer)
        rate = stage.optimizer
        return Loop(
            job=job,
            accelerator=accelerator,
            objective=stage.objective,
            ctx=ctx,
            transformer=backbone.transformer,
            named=named,
            optimizer=torch.optim.AdamW(
                list(named.values()),
                lr=rate.lr,
                betas=rate.betas,
                eps=rate.eps,
                weight_decay=rate.weight_decay,
                fused=True,
            ),
            ema=weights.Ema.of(named, stage.ema) if stage.ema is not None else None,
            fault=Fault.none(device),
        )

    def batches(self) -> Generator[Batch, None, None]:
        """This rank's share of each step's batch, from the next step on."""
        return data.batches(
            self.job.dataset,
            start=self.step,
            batch=self.job.stage.rows,
            group=self.objective.rows_per_prompt,
            seed=self.job.seed,
            stage=self.job.stage.name,
            order=self.job.order,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            device=self.accelerator.device,
        )

    def take_step(self, batch: Batch) -> None:
        """One batch: experience, then an optimiser step on each of its parts."""
        started = time.perf_counter()
        stage = self.job.stage
        ctx = attrs.evolve(self.ctx, first=self._first)
        for group in self.optimizer.param_groups:
            group["lr"] = stage.optimizer.rate(self.step, stage.steps)
        experience = self.objective.experience(batch, ctx.at(self._rng("experience", 0, batch)))
        for update, part in enumerate(experience):
            self._update(update, part, ctx)
        self.step += 1
        if self.accelerator.device.type == "cpu":
            self.fault.refuse(stage.name)
        elapsed = time.perf_counter() - started
        self.seconds += elapsed
        self._since = (self._since[0] + stage.rows, self._since[1] + elapsed)
        self._first = False

    def _update(self, update: int, part: Part, ctx: Context) -> None:
        """Backward over a part's micro-batches, then one optimiser step."""
        size = ctx.micro_batch
        firsts = range(0, len(part), size)
        count: float | Tensor = 0.0
        for name, values in part.metrics.items():
            self.means.add(name, values)
        for first in firsts:
            piece = part[first : first + size] if len(firsts) > 1 else part
            bound = ctx.at(self._rng("terms", update, piece))
            count = count + self._backward(piece, bound, last=first == firsts[-1])
        self._apply(count)

    def _backward(self, part: Part, ctx: Context, *, last: bool) -> float | Tensor:
        """Backward on each term as it is yielded, so that one graph lives at a time; the items there were.

        A term's forward runs inside next(): all but the step's last one run without gradient exchange.
        """
        count: float | Tensor = 0.0
        terms = self.objective.terms(part, ctx)
        number = self.objective.num_terms
        for index in range(number):
            with nullcontext() if last and index == number - 1 else self.accelerator.no_sync(self.transformer):
                term = next(terms, None)
                assert term is not None, (
                    f"{type(self.objective).__name__} yielded {index} terms, not num_terms = {number}"
                )
                self.accelerator.backward(term.total)
            self._note(term, index)
            count = count + term.count
            del term
        assert next(terms, None) is None, f"{type(self.objective).__name__} yields more than num_terms = {number} terms"
        return count

    def _note(self, term: Term, index: int) -> None:
        self.fault.see(term.total.detach(), self.step, index)
        for name, values in term.metrics.items():
            self.means.add(name, values)

    def _apply(self, count: float | Tensor) -> None:
        """Divide by the global count, clip, step; all on the device.

        A non-finite loss or gradient, now or before, makes the fused optimiser leave every weight as it is.
        """
        import torch

        world, device = self.accelerator.num_processes, self.accelerator.device
        total = summed(torch.as_tensor(count, dtype=torch.float32, device=device), self.accelerator)
        scale = torch.where(total > 0, world / total, 0)
        grads = [p.grad for p in self.named.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads) * scale
        self.fault.see(norm, self.step, -1)
        limit = self.job.stage.max_grad_norm
        factor = scale * (limit / (norm + 1e-6)).clamp(max=1)
        torch._foreach_mul_(grads, factor)  # pyright: ignore[reportPrivateUsage]
        self.optimizer.found_inf = (self.fault.seen | (total <= 0)).float()  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.named)
        self.means.add("grad_norm", norm)

    def _rng(self, purpose: str, update: int, part: Part) -> Rng:
        return Rng((self.job.seed, self.job.stage.name, self.step, purpose, update), part.rows)

    def report(self) -> Metrics:
        """Means over all ranks since the last report; the only place of a step that waits for the device."""
        self.fault.refuse(self.job.stage.name)
        samples, seconds = self._since
        self._since = (0, 0.0)
        rate = self.job.stage.optimizer.rate(self.step - 1, self.job.stage.steps)
        return {
            **self.means.take(self.accelerator),
            "lr": rate,
            "samples_per_second": samples / max(seconds, 1e-9),
            "seconds": self.seconds,
        }

    def finish(self) -> Cost:
        """The stage's final weights, averaged where it averages, in the unwrapped model."""
        self.fault.refuse(self.job.stage.name)
        if self.ema:
            self.ema.swap(self.named)
        self.job.backbone.transformer = self.accelerator.unwrap_model(self.transformer)
        self.accelerator.free_memory()
        rows = self.job.stage.rows * self.step
        return Cost(self.seconds, rows / max(self.seconds, 1e-9), memory.peak(self.accelerator.device))

    def save(self) -> int:
        """Write a checkpoint of the step just finished; never one of spoilt weights."""
        self.fault.refuse(self.job.stage.name)
        if self.accelerator.is_main_process:
            folder = self.job.folder / "checkpoints"
            info = {"seconds": self.seconds, "since": list(self._since)}
            path = state.save(folder, self.step, self._tensors(), info, self.job.stage.keep)
            self.job.saved(self.step, path)
        self.accelerator.wait_for_everyone()
        return self.step

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"weights/{name}": p for name, p in self.named.items()}
        for name, parameter in self.named.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer/{key}/{name}"] = value
        if self.ema:
            tensors |= {f"ema/{name}": t for name, t in self.ema.average.items()}
        return tensors | {f"means/{name}": t for name, t in self.means.sums.items()}

    def resume(self) -> None:
        """Continue from the newest whole checkpoint, if there is one."""
        found, damaged = state.latest(self.job.folder / "checkpoints")
        for message in damaged:
            self.accelerator.print(message)
        if found is None:
            return
        device = self.accelerator.device
        self.step, self.seconds = found.step, found.info["seconds"]
        self._since = (found.info["since"][0], found.info["since"][1])
        for name, parameter in self.named.items():
            parameter.data.copy_(found.tensors[f"weights/{name}"])
            keys = [k for k in found.tensors if k.startswith("optimizer/") and k.split("/", 2)[2] == name]
            self.optimizer.state[parameter] = {k.split("/")[1]: found.tensors[k].to(device) for k in keys}
            if self.ema:
                self.ema.average[name].copy_(found.tensors[f"ema/{name}"])
        self.means.sums = {k[len("means/") :]: t for k, t in found.tensors.items() if k.startswith("means/")}


def _gatherer(accelerator: Accelerator) -> Callable[[Tensor], Tensor]:
    """Rows of all ranks in global order; the ranks' shares are contiguous, so concatenation is."""

    def gather(x: Tensor) -> Tensor:
        if accelerator.num_processes == 1:
            return x
        every: Any = accelerator.gather(x.to(accelerator.device))
        return every.to(x.device)

    return gather
