"""The networks that a stage holds beside the one it trains: the decoder of latents, and those of rewards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from attrs import frozen

from corefit.pipeline.pipeline import Pipeline
from corefit.types import Reward, SizedDecoder, SizedReward, SizedScore
from corefit.types.stage import Stage

DECODES = {"reward", "reward_gradient"}
"""Names in an objective's `uses` that mean that samples are decoded while it trains."""


@frozen(eq=False)
class Frozen:
    """The frozen networks that are in a device's memory while a stage trains, on the meta device.

    decoder  the decoder of latents; None if the stage decodes nothing, or if the backbone does not say
    rewards  the networks of rewards that do say; equal keys give one network
    graphs   the rewards of the stage that can tell what the graph of their score holds, each with its network; none
             for an objective that needs no gradient of rewards
    scores   the rewards of the stage that can tell what a score takes, each with its network
    """

    decoder: Any
    rewards: Sequence[Any]
    graphs: Sequence[tuple[SizedScore, Any]]
    scores: Sequence[tuple[SizedScore, Any]] = ()

    @staticmethod
    def of(pipeline: Pipeline, stage: Stage, backbone: Any) -> Frozen:
        """Return the networks of a stage.

        Rewards of earlier stages, of evaluation and of encoding count too: their networks are kept for the next use.
        """
        uses = stage.objective.uses
        decodes = bool(DECODES & uses) or stage.sample_every is not None
        decoder = backbone.load_blank_decoder() if decodes and isinstance(backbone, SizedDecoder) else None
        blank: list[tuple[Any, Any]] = []
        for reward in sized_rewards(pipeline, stage):
            if all(reward != other for other, _ in blank):
                blank.append((reward, reward.load_blank()))
        networks = {id(network): network for _, network in blank if network is not None}
        own = [entry.value for entry in stage.reward]
        scores = [(r, n) for r, n in blank if r in own and n is not None and isinstance(r, SizedScore)]
        return Frozen(decoder, list(networks.values()), scores if "reward_gradient" in uses else [], scores)


def sized_rewards(pipeline: Pipeline, last: Stage | None = None) -> Iterator[SizedReward]:
    """Yield the rewards with networks that a process may have used by the end of the stage `last`, or of all stages."""
    entries = [*pipeline.data.score, *(pipeline.eval.reward if pipeline.eval else ())]
    for stage in pipeline.stage:
        entries += [*stage.reward, *getattr(stage, "held_out", ())]
        if stage is last:
            break
    for entry in entries:
        reward: Reward = entry.value
        if isinstance(reward, SizedReward):
            yield cast(SizedReward, reward)


def bytes_of(network: Any) -> int:
    """Return the bytes of a network's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))
