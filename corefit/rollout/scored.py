"""Scored samples of a policy, in groups of a prompt: what objectives on the forward process train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from attrs import evolve, field, frozen, validators

from corefit.rng import Rng
from corefit.rollout.groups import group_advantages, informative_rows, sample, score_metrics
from corefit.types import Backbone, Batch, Condition
from corefit.types.objective import Context, Objective, Part

if TYPE_CHECKING:
    from torch import Tensor


@frozen(eq=False)
class Scored:
    """Clean samples of a policy with their advantages; a part that can be trained on.

    x0          clean latents [B, ...], float32
    advantages  how much better each sample is than its group, [B] float32, clamped to [-adv_clip_max, adv_clip_max]
    cond        the condition of the prompts
    rows        global sample numbers, as in `Batch.rows`
    rng         draws that belong to the samples: the same in each update and epoch, where those of `ctx.rng` differ
    extra       further tensors [B, ...] that an objective adds, by name; they are sliced with the rows
    """

    x0: Tensor
    advantages: Tensor
    cond: Condition
    rows: Sequence[int]
    rng: Rng
    extra: Mapping[str, Tensor] = field(factory=dict[str, "Tensor"])
    metrics: Mapping[str, Tensor] = field(factory=dict[str, "Tensor"])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice) -> Scored:
        """Return a slice of the samples, without the metrics, which describe all of them."""
        extra = {name: tensor[rows] for name, tensor in self.extra.items()}
        return Scored(self.x0[rows], self.advantages[rows], self.cond[rows], self.rows[rows], self.rng[rows], extra)


P = TypeVar("P", bound=Part)


@frozen
class Grouped(Objective[P], Generic[P]):
    """Base of objectives that learn from groups of a prompt's samples, in one or more passes over each batch."""

    group: int = field(default=24, validator=[validators.ge(2), validators.le(10_000)])
    """Number of samples per prompt; they are on the same rank."""
    epochs: int = field(default=1, validator=[validators.ge(1), validators.le(10_000)])
    """Number of passes over each batch of samples."""
    updates: int = field(default=1, validator=validators.ge(1))
    """Number of optimizer steps per pass; each takes an equal share of every group."""

    def __attrs_post_init__(self) -> None:
        if self.group % self.updates:
            raise ValueError(f"'updates' must divide 'group': {self.updates} does not divide {self.group}")

    @property
    def group_size(self) -> int:
        return self.group

    @property
    def num_updates(self) -> int:
        return self.epochs * self.updates


@frozen
class GroupObjective(Grouped[Scored]):
    """Base of objectives that train on clean samples of a policy, weighed by how good each is in its group.

    A subclass writes `uses`, `num_terms`, `experience` (of `collect` and `shares`) and `terms`.
    """

    steps: int = field(default=10, validator=[validators.ge(1), validators.le(10_000)])
    """Number of sampling steps."""
    guidance: float = field(default=1.0, validator=validators.gt(0))
    """Scale of classifier-free guidance of the samples; 1 is none."""
    global_std: bool = True
    """Divide advantages by the standard deviation over all rewards of the batch, or else over the group."""
    adv_clip_max: float = field(default=5.0, validator=validators.gt(0))
    """Advantages are clamped to [-adv_clip_max, adv_clip_max]."""

    def collect(self, batch: Batch, ctx: Context, policy: Backbone) -> Scored:
        """Sample a batch with `policy` and the stage's sampler, score it, and compute the advantages, on all ranks."""
        with ctx.scoring(batch) as scoring:
            x0 = sample(batch, ctx, steps=self.steps, guidance=self.guidance, backbone=policy, scoring=scoring)
            scores = scoring.result()
        advantages = group_advantages(scores.total, batch, ctx, self.group, global_std=self.global_std).float()
        return Scored(
            x0,
            advantages.clamp(-self.adv_clip_max, self.adv_clip_max).to(x0.device, non_blocking=True),
            batch.cond,
            batch.rows,
            ctx.rng.of("samples"),
            metrics=score_metrics(scores, informative_rows(advantages, self.group)),
        )

    def shares(self, samples: Scored) -> Sequence[Scored]:
        """Return the parts of one pass: each of the `updates` optimizer steps takes an equal share of every group."""
        shares = [samples[update :: self.updates] for update in range(self.updates)]
        return [evolve(share, metrics=samples.metrics) for share in shares]
