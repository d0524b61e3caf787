"""The keys of one stage as classes, one for each TOML table, and the check that they do not contradict each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attrs import field, frozen, validators

from corefit.types.objective import Objective
from corefit.types.protocols import Backbone, NoiseWeighting, Reward, Sampler
from corefit.types.values import MOST, ROUNDING, Weighted

if TYPE_CHECKING:
    from torch import Tensor

positive: Any = validators.gt(0)
some_positive: Any = validators.optional(positive)
some_rows: Any = validators.optional([positive, validators.le(MOST)])
share: Any = [validators.ge(0), validators.lt(1)]


@frozen(kw_only=True)
class Optimizer:
    """AdamW, and its learning rate over the steps."""

    lr: float = field(default=2e-5, validator=positive)
    """The learning rate after the warm-up."""
    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=validators.deep_iterable(share))
    """The decay rates of the running means of the gradient and of its square."""
    eps: float = field(default=1e-8, validator=positive)
    """The number added to the denominator."""
    weight_decay: float = field(default=1e-2, validator=validators.ge(0))
    """The decoupled weight decay."""
    warmup: int = field(default=0, validator=validators.ge(0))
    """The number of steps in which the learning rate rises linearly, from lr / warmup at the first one to lr."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate after the warm-up: it stays, or falls along a line or half a cosine, reaching 0 one step after
    the last."""

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of `step`, counted from 0, out of `steps`.

        It falls like transformers' schedules of the same names, so with `linear` the last step has the rate
        lr / (steps - warmup). It rises one step earlier than theirs, whose first step has the rate 0 and so changes
        nothing.
        """
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, steps - self.warmup)
        fall = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return self.lr * fall[self.schedule]


@frozen
class Full:
    """Train every weight of the transformer."""


@frozen(kw_only=True)
class Lora:
    """Train a low-rank adapter (peft) on the transformer's projections."""

    rank: int = field(default=16, validator=positive)
    """The rank of the two factors."""
    alpha: float | None = field(default=None, validator=some_positive)
    """The adapter is scaled by alpha / rank; alpha is the rank by default, for a scale of 1."""
    targets: tuple[str, ...] | None = None
    """The names of the modules to adapt; by default those that the backbone names."""


Training = Full | Lora


@frozen(kw_only=True)
class Stage:
    """One `[[stage]]` of a pipeline: what is learned, from which data and rewards, and for how many steps."""

    name: str = field(validator=validators.matches_re(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}"))
    """The stage's name: its folder, its row in the results, and how `--set` and `--from` call it."""
    steps: int = field(validator=[positive, validators.le(1_000_000_000)])
    """The number of batches to train on; an objective may take several optimizer steps on each."""
    objective: Objective[Any]
    """The objective, which defines what is learned."""
    batch: int | None = field(default=None, validator=some_rows)
    """The number of samples in a step, over all ranks; rollouts, if the objective rolls out. The default is 32, or 48
    groups."""
    micro_batch: int | None = field(default=None, validator=some_rows, metadata=ROUNDING)
    """The number of samples in one forward of a rank; by default all samples that the rank has in a step. It changes
    memory and rounding, not what is learned."""
    noise: NoiseWeighting | None = None
    """The noise levels to train on and their weights; logit_normal by default, if the objective reads a weighting."""
    sampler: Sampler | None = None
    """The sampler of the objective's rollouts; needed if the objective rolls out."""
    reward: tuple[Weighted[Reward], ...] = ()
    """The rewards to learn from, each with a weight; the objective learns from their weighted sum."""
    train: Training | None = None
    """The weights to train: all of them, or a LoRA; by default as in [backbone]."""
    optimizer: Optimizer = field(factory=Optimizer)
    """The settings of AdamW and its learning rate."""
    max_grad_norm: float = field(default=1.0, validator=positive)
    """The norm to which a larger gradient is clipped."""
    ema: float | None = field(default=None, validator=validators.optional(share))
    """The decay of an exponential moving average of the weights. If it is set, the stage saves the average."""
    save_dtype: Literal["fp32", "bf16"] = "fp32"
    """The dtype of the weights that full training saves. bf16 halves the folder, but the rounded weights are evaluated,
    and the next stage starts from them. Rounding loses small updates; the table of results shows what share is kept."""
    log_every: int = field(default=10, validator=positive)
    """The number of steps between lines of metrics.jsonl; each line has the means since the line before."""
    checkpoint_every: int = field(default=500, validator=positive)
    """The number of steps between checkpoints; one is also written when a signal stops the run."""
    keep: int = field(default=2, validator=positive)
    """The number of newest checkpoints to keep."""
    sample_every: int | None = field(default=None, validator=some_positive)
    """The number of steps between sample grids of the [eval] prompts, drawn from the average if there is `ema`. A grid
    is drawn at the end in any case."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What to do about a loss, gradient or reward that is not finite: stop before weights change, or skip that step."""
    max_skips: int | None = field(default=None, validator=some_positive)
    """The number of optimizer steps that on_nan = "skip" may skip before the stage stops; 10 by default."""

    def reports(self, step: int) -> bool:
        """Return whether metrics are logged after `step` steps."""
        return step == self.steps or step % self.log_every == 0 or self.samples(step)

    def samples(self, step: int) -> bool:
        """Return whether a sample grid is drawn after `step` steps, other than the one at the end of the stage."""
        return self.sample_every is not None and step % self.sample_every == 0 and step < self.steps

    @property
    def skips(self) -> int:
        """The number of optimizer steps that may be skipped."""
        return (self.max_skips or 10) if self.on_nan == "skip" else 0

    @property
    def rows(self) -> int:
        """The number of samples, or rollouts, in a step over all ranks."""
        group = self.objective.group_size
        return self.batch or (32 if group == 1 else 48 * group)

    def problems(self) -> Iterator[str]:
        """Yield a message, with its key, for everything that cannot work and every key that nothing would read."""
        uses = self.objective.uses
        for key, given in (("noise", self.noise), ("sampler", self.sampler), ("reward", self.reward)):
            if given and key not in uses:
                yield f"{key}: this objective does not read it; remove the key"
        if "sampler" in uses and self.sampler is None:
            yield 'sampler is missing; the objective takes stochastic steps, such as sampler = { use = "cps" }'
        elif "sampler" in uses and self.sampler is not None and not self.sampler.stochastic:
            yield "sampler: it is deterministic, and the objective needs one that adds noise, such as flow_sde or cps"
        if "reward" in uses and not self.reward:
            yield 'reward is missing; the objective learns from it, such as reward = [{ use = "ocr" }]'
        yield from self._batch_problems()
        if self.max_skips is not None and self.on_nan != "skip":
            yield 'max_skips: nothing is skipped; set on_nan = "skip" or remove the key'
        if self.optimizer.warmup > self.steps:
            yield f"optimizer.warmup: {self.optimizer.warmup} steps are more than the stage's {self.steps}; lower it"
        names = [w.name for w in self.reward]
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield f"reward: {name!r} is listed twice; give it one entry with the sum of the weights"

    def _batch_problems(self) -> Iterator[str]:
        group = self.objective.group_size
        if self.rows > MOST:
            yield f"batch: {self.rows} rollouts a step, 48 groups of {group}, are more than {MOST}; set it lower"
        if self.rows % group:
            nearest = max(1, round(self.rows / group)) * group
            yield f"batch: {self.rows} rollouts are not whole groups of {group}; use a multiple, such as {nearest}"
        if self.micro_batch is not None and self.micro_batch > self.rows:
            yield f"micro_batch: {self.micro_batch} is more than the batch of {self.rows}; lower it"


Samples = Callable[[], tuple[Sequence[str], "Tensor"]]
"""A function that samples: it returns prompts and their media."""


@frozen(eq=False)
class TrainState:
    """The state of a running stage, for observers to read.

    step      the number of finished steps
    folder    the stage's folder, such as runs/<name>/01-soar; it contains `model/` once the stage has finished
    backbone  the backbone with the weights that the stage would save now, which are the average if it has `ema`
    sample    returns (prompts, media [n, 3, H, W], or clips, in [0, 1]) for the leading [eval] prompts, always from the
              same noise. It is None without [eval]; with sharded weights also, except at the steps of `sample_every`
    """

    step: int
    folder: Path
    backbone: Backbone
    sample: Samples | None = None
