"""The classes behind one `[[stage]]` of a pipeline file, and the checks that its keys go together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attrs import field, frozen, validators

from corefit.types import optimizer as optimizers
from corefit.types.objective import Objective
from corefit.types.protocols import Backbone, NoiseWeighting, Reward, Sampler
from corefit.types.values import MOST, ROUNDING, Weighted

if TYPE_CHECKING:
    from torch import Tensor

positive: Any = validators.gt(0)
some_positive: Any = validators.optional(positive)
some_rows: Any = validators.optional([positive, validators.le(MOST)])
share: Any = [validators.ge(0), validators.lt(1)]
Optimizer = optimizers.AdamW
"""`AdamW`, under the name that it had before there were other optimizers."""


@frozen
class Full:
    """Train every weight of the transformer."""


@frozen(kw_only=True)
class Lora:
    """Train a low-rank adapter (peft) on the transformer's projections."""

    rank: int = field(default=16, validator=positive)
    """Rank of the adapter: the inner size of its two factors."""
    alpha: float | None = field(default=None, validator=some_positive)
    """The adapter's output is scaled by alpha / rank; by default alpha is the rank, so the scale is 1."""
    targets: tuple[str, ...] | None = None
    """Names of the modules that get an adapter; by default the backbone chooses them."""


Training = Full | Lora


@frozen(kw_only=True)
class Alarm:
    """When training is said to exploit its reward: the reward rises while a held-out one falls.

    A trend over the last `window` logged steps is measured by Mann and Kendall's z: the pairs of steps that rise minus
    those that fall, in standard deviations of that number without a trend. It depends on the order of the values alone,
    not on their scale or distribution.
    """

    window: int = field(default=30, validator=[validators.ge(10), validators.le(500)])
    """How many logged steps are looked at; no alarm sounds before there are as many."""
    threshold: float = field(default=4.0, validator=positive)
    """The z below whose negative a held-out reward counts as falling; the trained one counts as rising above 2."""
    stop: bool = False
    """Whether an alarm ends the stage: its weights are saved as they are, and the pipeline goes on with the next."""

    def __attrs_post_init__(self) -> None:
        pairs, variance = math.comb(self.window, 2), self.window * (self.window - 1) * (2 * self.window + 5) / 18
        most = (pairs - 1) / math.sqrt(variance)
        if self.threshold >= most:
            raise ValueError(f"'threshold' must be below {most:.3g}, the largest z of {self.window} logged steps")


@frozen(kw_only=True)
class Stage:
    """One `[[stage]]`: what is trained, on what, and for how long."""

    name: str = field(validator=validators.matches_re(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}"))
    """The stage's name: it names the folder, the row in the results, and the stage in `--set` and `--from`."""
    steps: int = field(validator=[positive, validators.le(1_000_000_000)])
    """Number of batches to train on. Some objectives take several optimizer steps on each batch."""
    objective: Objective[Any]
    """The objective, which defines the loss."""
    from_: str | None = None
    """What the stage starts from: `"base"`, or the name of an earlier stage; by default the stage before it, and for
    the first stage the base. Stages that start from the same weights are branches."""
    batch: int | None = field(default=None, validator=some_rows)
    """Samples per step over all GPUs, or rollouts if the objective makes them; by default 32 samples, or 48 groups."""
    micro_batch: int | None = field(default=None, validator=some_rows, metadata=ROUNDING)
    """Samples per forward pass on one GPU. By default the GPU's whole share of the batch, or what fits into its memory
    of that: the trainer finds it in the first steps. It changes memory use and rounding, nothing else."""
    noise: NoiseWeighting | None = None
    """The distribution of noise levels in training. By default logit_normal, if the objective draws noise levels."""
    sampler: Sampler | None = None
    """The sampler of the rollouts; objectives that learn from rollouts need one that adds noise."""
    reward: tuple[Weighted[Reward], ...] = ()
    """The rewards to learn from. The objective sees their sum, each multiplied by its `weight`."""
    held_out: tuple[Weighted[Reward], ...] = ()
    """Rewards that score the same samples and are logged as `held_out/NAME`, and that nothing is trained on."""
    alarm: Alarm | None = None
    """When to say that a held-out reward falls while the trained one rises; by default whenever there is a held-out
    one."""
    train: Training | None = None
    """Which weights are trainable in this stage; by default what `train` of `[backbone]` says."""
    optimizer: optimizers.Optimizer = field(factory=optimizers.AdamW)
    """The optimizer and the schedule of its learning rate; without `use` it is AdamW."""
    copies: Literal["cpu"] | None = field(default=None, metadata=ROUNDING)
    """Set to "cpu" it keeps the average (`ema`), the reference policy and the copies of the weights that an objective
    declares in main memory. An average or copy crosses to the device and back, one weight at a time, when it moves;
    one that an objective calls is on the device as a whole for the call. It changes no result but for rounding."""
    max_grad_norm: float = field(default=1.0, validator=positive)
    """A gradient with a larger norm is scaled down to this norm (gradient clipping)."""
    ema: float | None = field(default=None, validator=validators.optional(share))
    """Decay of an exponential moving average of the weights. If it is set, the stage saves the average."""
    save_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which full training saves its weights. bf16 halves the folder. The rounded weights are then what is
    evaluated and what the next stage starts from; rounding loses small updates, and the results say what share is left.
    """
    log_every: int = field(default=10, validator=positive)
    """Steps between two lines of metrics.jsonl. Each line has the means over the steps since the line before."""
    checkpoint_every: int = field(default=500, validator=positive)
    """Steps between checkpoints. Stopping the run with Ctrl-C or SIGTERM writes one, too."""
    keep: int = field(default=2, validator=positive)
    """How many checkpoints are kept; older ones are deleted."""
    sample_every: int | None = field(default=None, validator=some_positive)
    """Steps between sample grids, drawn from the first `[eval]` prompts with the weights that the stage would save now.
    One more is drawn when the stage is finished, in any case where there is an `[eval]`."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What happens when a loss, gradient or reward is NaN or infinite: stop the run before weights change, or skip that
    optimizer step."""
    max_skips: int | None = field(default=None, validator=some_positive)
    """How many optimizer steps `on_nan = "skip"` may skip before the run stops after all; 10 by default."""

    def reports(self, step: int) -> bool:
        """Return whether metrics are logged after `step` steps."""
        return step == self.steps or step % self.log_every == 0 or self.samples(step)

    def samples(self, step: int) -> bool:
        """Return whether `sample_every` asks for a sample grid after `step` steps; the last step's is always drawn."""
        return self.sample_every is not None and step % self.sample_every == 0 and step < self.steps

    @property
    def watch(self) -> Alarm | None:
        """The settings of the alarm; None without held-out rewards."""
        return (self.alarm or Alarm()) if self.held_out else None

    @property
    def ends_on_alarm(self) -> bool:
        """Whether held-out rewards decide when the stage ends, and so on its weights."""
        return self.watch is not None and self.watch.stop

    @property
    def logged_steps(self) -> int:
        """The number of steps after which metrics are logged."""
        return sum(map(self.reports, range(1, self.steps + 1))) if self.steps < 1_000_000 else self.steps

    @property
    def skips(self) -> int:
        """The number of optimizer steps that may be skipped."""
        return (self.max_skips or 10) if self.on_nan == "skip" else 0

    @property
    def rows(self) -> int:
        """Samples, or rollouts, per step over all ranks."""
        group = self.objective.group_size
        return self.batch or (32 if group == 1 else 48 * group)

    def problems(self) -> Iterator[str]:
        """Yield one message, with its key, for each setting that cannot work or that nothing would read."""
        uses = self.objective.uses
        readers = {"noise": {"noise"}, "sampler": {"sampler", "stochastic"}, "reward": {"reward", "reward_gradient"}}
        for key, given in (("noise", self.noise), ("sampler", self.sampler), ("reward", self.reward)):
            if given and not readers[key] & uses:
                yield f"{key}: this objective does not read it; remove the key"
        if "stochastic" in uses and self.sampler is None:
            yield 'sampler is missing; the objective takes stochastic steps, such as sampler = { use = "cps" }'
        elif "stochastic" in uses and self.sampler is not None and not self.sampler.stochastic:
            yield "sampler: it is deterministic, and the objective needs one that adds noise, such as flow_sde or cps"
        if {"reward", "reward_gradient"} & uses and not self.reward:
            yield 'reward is missing; the objective learns from it, such as reward = [{ use = "ocr" }]'
        for entry in self.reward if "reward_gradient" in uses else ():
            if not getattr(entry.value, "differentiable", False):
                yield (
                    f"reward: {entry.name!r} has no gradient, and the objective learns from gradients; name one that "
                    "is differentiable, or use an objective that needs scores alone, such as flow_grpo"
                )
        yield from self._held_out_problems()
        yield from self._batch_problems()
        if self.max_skips is not None and self.on_nan != "skip":
            yield 'max_skips: nothing is skipped; set on_nan = "skip" or remove the key'
        if self.optimizer.warmup > self.steps:
            yield f"optimizer.warmup: {self.optimizer.warmup} steps are more than the stage's {self.steps}; lower it"
        names = [w.name for w in self.reward]
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield f"reward: {name!r} is listed twice; give each a `name` of its own, or one the sum of the weights"

    def _held_out_problems(self) -> Iterator[str]:
        """Yield what is wrong with normalized and held-out rewards, and with the alarm."""
        uses = self.objective.uses
        for entry in self.reward if "reward_gradient" in uses else ():
            if entry.normalize != "none":
                yield (
                    f"reward: {entry.name!r} has 'normalize', and gradients need a fixed scale; remove the key, and "
                    "set 'weight' to 1 over the spread of its scores"
                )
        if self.held_out and not {"reward", "reward_gradient"} & uses:
            yield "held_out: this objective makes no samples that could be scored; remove the key"
        names = [entry.name for entry in self.held_out]
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield f"held_out: {name!r} is listed twice; remove one, or give each a `name` of its own"
        for entry in self.held_out:
            if entry.weight != 1 or entry.normalize != "none":
                yield f"held_out: {entry.name!r} is not summed with others; remove its 'weight' and 'normalize'"
            if any(entry.value == other.value for other in self.reward):
                yield f"held_out: {entry.name!r} with these keys is trained on; name another reward, or other keys"
        if self.alarm is None:
            return
        if not self.held_out:
            yield 'alarm: there is no held-out reward to watch; add held_out = [{ use = "..." }] or remove the table'
        elif self.logged_steps < self.alarm.window:
            yield (
                f"alarm.window: it needs {self.alarm.window} logged steps, and the stage logs {self.logged_steps}; "
                "lower it, or lower log_every"
            )

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
"""Generates samples: returns prompts, and media [n, 3, (T,) H, W] in [0, 1]."""


@frozen(eq=False)
class TrainState:
    """The state of a running stage that observers are given.

    step      number of steps that are finished
    folder    the stage's folder, such as runs/<name>/01-soar; it has `model/` once the stage is finished
    backbone  the backbone with the weights that the stage would save now: their average if the stage has `ema`
    sample    generates samples of the first [eval] prompts, always from the same noise, and returns (prompts, media
              [n, 3, H, W] or clips, in [0, 1]). They are generated once, however many observers ask. None without
              [eval]; with sharded weights also None, except at steps where the stage's own sample grid is due
    grid      the PNG of the stage's own sample grid, at steps where it is due; corefit draws it before any
              `[[observer]]` is told, and `sample` then costs nothing more
    """

    step: int
    folder: Path
    backbone: Backbone
    sample: Samples | None = None
    grid: Path | None = None
