"""Rewards as objectives are given them in checks: what they score is noted, and whether their gradient arrives."""

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
class Heard(Reward):
    """A reward that notes its scores.

    in_terms  whether terms() asks it: a score of media with a graph then has one too
    """

    reward: Reward
    in_terms: bool = False
    _given: list[Tensor] = field(init=False, factory=list["Tensor"])

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
        self._given.append(given)
        return scores

    def take(self) -> list[Tensor]:
        """The scores given since they were last taken."""
        given, self._given = self._given, []
        return given

    def __getattr__(self, name: str) -> Any:
        """What else the reward has."""
        return getattr(self.reward, name)


def hearing(ctx: Context, *, in_terms: bool = False) -> tuple[Context, list[Heard]]:
    """The same context with rewards that note their scores, and these rewards."""
    rewards = [Heard(each.reward, in_terms) for each in ctx.rewards]
    entries = [evolve(each, value=reward) for each, reward in zip(ctx.rewards, rewards, strict=True)]
    return evolve(ctx, rewards=entries), rewards


def taken(rewards: Sequence[Heard]) -> list[Tensor]:
    """The scores that rewards gave since they were last taken."""
    return [scores for reward in rewards for scores in reward.take()]
