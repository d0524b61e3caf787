"""Diffusion-DPO on given pairs, `dpo`, and on the best and the worst sample of each group, `online_dpo`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from attrs import evolve, field, frozen, validators

from corefit import Batch, Condition, Context, Objective, Term
from corefit.flow import interpolate, per_sample
from corefit.rollout import sample, score_metrics, share_rows
from corefit.types import Backbone, Moving
from corefit_dpo.pairs import Pairs, best_and_worst, preferred

if TYPE_CHECKING:
    from torch import Tensor

one_to_many = (validators.ge(1), validators.le(10_000))


@frozen
class Preference(Objective[Pairs]):
    """What both objectives have in common: the loss of pairs, Diffusion-DPO (arXiv 2311.12908), eq. 14."""

    moving: ClassVar[str]
    """The name of the reference if it moves."""
    beta: float = field(default=100.0, validator=validators.gt(0))
    """How strongly the policy is held to the reference; errors are means over dimensions, as in published code."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """-log sigmoid(margin), DPO's, or (margin - 1/2)^2, IPO's, which ends at a margin instead of growing it forever."""
    sft: float = field(default=0.0, validator=validators.ge(0))
    """Weight of the winner's flow-matching error, which is added to the loss; it keeps that error from rising."""
    dropout: float = field(default=0.0, validator=[validators.ge(0), validators.lt(1)])
    """Share of pairs whose prompt is replaced by the empty prompt."""
    reference_every: int | None = field(default=None, validator=validators.optional(validators.ge(1)))
    """Number of steps after which the policy becomes the reference; by default that stays as the stage began."""

    @property
    def uses(self) -> frozenset[str]:
        return frozenset({"noise"} if self.reference_every else {"noise", "reference"})

    @property
    def num_terms(self) -> int:
        return 1

    @property
    def rows_per_graph(self) -> int:
        return 2

    @property
    def copies(self) -> Mapping[str, Moving]:
        every = self.reference_every
        return {self.moving: Moving(lambda n: float(n % every > 0))} if every else {}

    def terms(self, part: Pairs, ctx: Context) -> Iterator[Term]:
        for _ in range(self.num_terms):
            yield self._term(part, ctx)

    def _term(self, part: Pairs, ctx: Context) -> Term:
        """The loss of each pair at one noise and one noise level, which its two halves share."""
        import torch

        reference = ctx.copies[self.moving] if self.reference_every else ctx.reference
        assert reference is not None
        noise, sigma = ctx.randn_like(part.winner), ctx.sigma(part.winner)
        cond, weight = ctx.dropout(part.cond, self.dropout), ctx.noise.weight(sigma)
        with torch.no_grad():
            start = _errors(reference, part, noise, sigma, cond) * weight
        error = _errors(ctx.backbone, part, noise, sigma, cond) * weight
        winner, loser = error - start
        margin = -self.beta / 2 * (winner - loser)
        loss = preference_loss(margin, self.loss) + self.sft * error[0]
        metrics = {"accuracy": (margin > 0).float(), "margin": margin, "winner": winner, "loser": loser}
        metrics = {name: value.detach() for name, value in {"loss": loss, **metrics}.items()}
        return Term(loss.where(part.counted, 0).sum(), part.counted.sum(), metrics)


def preference_loss(margin: Tensor, form: Literal["sigmoid", "ipo"]) -> Tensor:
    """Return the loss of margins [B]; `ipo` is beta^2 times IPO's, eq. 17 of arXiv 2310.12036."""
    from torch.nn.functional import logsigmoid

    return -logsigmoid(margin) if form == "sigmoid" else (margin - 0.5) ** 2


def _errors(policy: Backbone, part: Pairs, noise: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
    """Return the squared errors of the velocity of the winners and of the losers, [2, B], in one forward."""
    import torch

    x0 = torch.cat([part.winner, part.loser])
    noise, sigma = torch.cat([noise, noise]), sigma.repeat(2)
    v = policy.velocity(interpolate(x0, noise, sigma), sigma, cond.repeat(2))
    return per_sample((v - (noise - x0)) ** 2).reshape(2, -1)


@frozen
class Dpo(Preference):
    """Diffusion-DPO on given pairs: the example's medium is the winner, and its further medium `rejected` the loser."""

    moving: ClassVar[str] = "dpo_reference"

    @property
    def uses(self) -> frozenset[str]:
        return super().uses | {"media", "media:rejected"}

    def experience(self, batch: Batch, ctx: Context) -> Iterable[Pairs]:
        import torch

        every = torch.ones(len(batch), dtype=torch.bool, device=batch.clean.device)
        yield Pairs(batch.clean, batch.extra["rejected"], every, batch.cond, batch.rows)


@frozen
class OnlineDpo(Preference):
    """Diffusion-DPO on pairs that the policy makes itself: the best and the worst sample of each group, by reward."""

    moving: ClassVar[str] = "online_dpo_reference"
    group: int = field(default=24, validator=[validators.ge(2), one_to_many[1]])
    """Number of samples per prompt; they are on the same rank, and give one pair."""
    steps: int = field(default=10, validator=one_to_many)
    """Number of sampling steps."""
    guidance: float = field(default=4.5, validator=validators.gt(0))
    """Scale of classifier-free guidance of the samples; the loss is that of the velocity without guidance."""
    draws: int = field(default=9, validator=one_to_many)
    """Number of noises, each with a noise level, at which an optimizer step trains each pair."""
    epochs: int = field(default=1, validator=one_to_many)
    """Number of optimizer steps on the pairs of each batch."""

    @property
    def uses(self) -> frozenset[str]:
        return super().uses | {"reward", "sampler"}

    @property
    def group_size(self) -> int:
        return self.group

    @property
    def num_terms(self) -> int:
        return self.draws

    @property
    def num_updates(self) -> int:
        return self.epochs

    def experience(self, batch: Batch, ctx: Context) -> Iterable[Pairs]:
        with ctx.scoring(batch) as scoring:
            x0 = sample(batch, ctx, steps=self.steps, guidance=self.guidance, scoring=scoring)
            scores = scoring.result()
        pairs = best_and_worst(x0, scores.total, batch, self.group)
        counted = preferred(scores.total, self.group)  # on the CPU, where reading it costs no wait
        metrics = score_metrics(scores, counted)
        for epoch, index in enumerate(share_rows(counted, ctx, 1, epochs=self.epochs)):
            yield evolve(pairs.take(index), metrics={} if epoch else metrics)
