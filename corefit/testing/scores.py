"""Wraps the rewards of a checked objective, to record their scores and to check that their gradient arrives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attrs import define, evolve, field

from corefit.testing.checks import expect
from corefit.types import Meta, Reward
from corefit.types.objective import Context

if TYPE_CHECKING:
    from torch import Tensor


@define(eq=False)
class RecordingReward(Reward):
    """Calls another reward and records its scores.

    in_terms  whether terms() calls it; if the media have a graph then, the scores must have one too
    """

    reward: Reward
    in_terms: bool = False
    _recorded: list[Tensor] = field(init=False, factory=list["Tensor"])

    def score(self, media: Tensor, prompts: Sequence[str], meta: Sequence[Meta]) -> Tensor:
        import torch

        scores = self.reward.score(media, prompts, meta)
        given = torch.as_tensor(scores)
        wanted = self.in_terms and media.requires_grad and torch.is_grad_enabled()
        expect(
            given.requires_grad or not wanted,
            f"the reward ({type(self.reward).__name__}) is given media with a graph in terms() and gives scores "
            "without one, so its gradient does not reach the model: score() must stay in torch, without no_grad, "
            "detach, item or numpy; if no gradient is wanted, give it detached media",
        )
        self._recorded.append(given)
        return scores

    def take(self) -> list[Tensor]:
        """Return the recorded scores and forget them."""
        recorded, self._recorded = self._recorded, []
        return recorded

    def __getattr__(self, name: str) -> Any:
        """Pass any other attribute on from the wrapped reward."""
        return getattr(self.reward, name)


def recording(ctx: Context, *, in_terms: bool = False) -> tuple[Context, list[RecordingReward]]:
    """Return the same context with rewards that record their scores, and these rewards."""
    rewards = [RecordingReward(each.value, in_terms) for each in ctx.rewards]
    entries = [evolve(each, value=reward) for each, reward in zip(ctx.rewards, rewards, strict=True)]
    return evolve(ctx, rewards=entries), rewards


def take_scores(rewards: Sequence[RecordingReward]) -> list[Tensor]:
    """Return the scores that rewards have recorded, and forget them."""
    return [scores for reward in rewards for scores in reward.take()]
