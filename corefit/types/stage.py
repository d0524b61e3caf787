"""What a pipeline says of one stage: the tables of TOML as classes, and what contradicts what."""

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
    """AdamW, and how its learning rate moves."""

    lr: float = field(default=2e-5, validator=positive)
    """Learning rate, after the warm-up."""
    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=validators.deep_iterable(share))
    """Decay of the running means of the gradient and of its square."""
    eps: float = field(default=1e-8, validator=positive)
    """Added to the denominator."""
    weight_decay: float = field(default=1e-2, validator=validators.ge(0))
    """Decoupled weight decay."""
    warmup: int = field(default=0, validator=validators.ge(0))
    """Steps over which the rate rises linearly, from lr / warmup in the first to lr in the last of them."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the rate does after the warm-up: stay, or fall to what would be 0 after the last step."""

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of `step`, counted from 0, of `steps`.

        It falls as transformers' schedules of these names do, so `linear` takes the last step at
        lr / (steps - warmup). Their warm-up is one step behind: its first step has the rate 0 and moves nothing.
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
    """Rank of the two factors."""
    alpha: float | None = field(default=None, validator=some_positive)
    """Scale of the adapter times rank; the rank itself by default."""
    targets: tuple[str, ...] | None = None
    """Names of the modules to adapt; the backbone's own choice by default."""


Training = Full | Lora


@frozen(kw_only=True)
class Stage:
    """One `[[stage]]`: what is learned, from what, for how long."""

    name: str = field(validator=validators.matches_re(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}"))
    """Of its folder, its row in the results, and in `--set` and `--from`."""
    steps: int = field(validator=[positive, validators.le(1_000_000_000)])
    """Batches; an objective may take several optimiser steps on each."""
    objective: Objective[Any]
    """What is learned."""
    batch: int | None = field(default=None, validator=some_rows)
    """Samples a step over all ranks, or rollouts where the objective rolls out; 32, or 48 groups, by default."""
    micro_batch: int | None = field(default=None, validator=some_rows, metadata=ROUNDING)
    """Samples a forward and rank; the whole share of a rank by default. Changes memory and rounding, not results."""
    noise: NoiseWeighting | None = None
    """logit_normal where the objective reads one and none is given."""
    sampler: Sampler | None = None
    """How a step is taken, where the objective takes stochastic ones."""
    reward: tuple[Weighted[Reward], ...] = ()
    """Rewards to learn from, each with its weight; their weighted sum counts."""
    train: Training | None = None
    """Which weights train; those of [backbone] train by default."""
    optimizer: Optimizer = field(factory=Optimizer)
    """AdamW and its learning rate."""
    max_grad_norm: float = field(default=1.0, validator=positive)
    """The gradient is scaled down to this norm where it is larger."""
    ema: float | None = field(default=None, validator=validators.optional(share))
    """Decay of an average of the weights, which is what the stage then leaves."""
    save_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the weights that full training saves. bf16 halves the folder, and the rounded weights are what is judged
    and what the next stage starts from; small updates do not survive that, and the table says what share did."""
    log_every: int = field(default=10, validator=positive)
    """Steps between lines of metrics.jsonl, each the means since the last."""
    checkpoint_every: int = field(default=500, validator=positive)
    """Steps between checkpoints; one is also written when a signal stops the run."""
    keep: int = field(default=2, validator=positive)
    """Checkpoints kept."""
    sample_every: int | None = field(default=None, validator=some_positive)
    """Steps between sample grids of the [eval] prompts, of the average if there is one; one at the end in any case."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What a loss, gradient or reward that is not finite does: stop before weights change, or skip that step."""
    max_skips: int | None = field(default=None, validator=some_positive)
    """Optimizer steps that `skip` may leave out before the stage stops after all; 10 by default."""

    def reports(self, step: int) -> bool:
        """Whether metrics are logged after `step` steps."""
        return step == self.steps or step % self.log_every == 0 or self.samples(step)

    def samples(self, step: int) -> bool:
        """Whether a sample grid is drawn after `step` steps; the last one is drawn when the stage is finished."""
        return self.sample_every is not None and step % self.sample_every == 0 and step < self.steps

    @property
    def skips(self) -> int:
        """Optimizer steps that may be skipped."""
        return (self.max_skips or 10) if self.on_nan == "skip" else 0

    @property
    def rows(self) -> int:
        """Samples, or rollouts, a step over all ranks."""
        group = self.objective.group_size
        return self.batch or (32 if group == 1 else 48 * group)

    def problems(self) -> Iterator[str]:
        """What cannot work, or would be read by nobody, each with its key."""
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
"""Makes prompts and their media."""


@frozen(eq=False)
class TrainState:
    """What observers may read of a running stage.

    step     steps finished
    folder   the stage's own, runs/<name>/01-soar for example; `model/` in it once the stage has finished
    backbone with the weights that the stage would leave now: their average where the stage has `ema`
    sample   makes (prompts, media [n, 3, H, W], or clips, in [0, 1]): the first [eval] prompts, always from the same
             noise; None without [eval], and of sharded weights but for the steps where the stage's own samples are due
    """

    step: int
    folder: Path
    backbone: Backbone
    sample: Samples | None = None
