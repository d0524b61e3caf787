"""One Flow-GRPO step written several ways, over one network, one set of prompts and the same draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, frozen

from benchmarks import plain
from corefit.rng import Rng

if TYPE_CHECKING:
    from torch import Tensor

    from corefit.types import Batch

EPSILON = 1e-4
"""Added to the rewards' standard deviation, as published."""


@frozen(kw_only=True)
class Settings:
    """Keys of the objective, and of the stage around it."""

    group: int
    steps: int
    guidance: float
    noise: float = 0.7
    clip: float = 1e-4
    advantage_clip: float = 5.0

    @property
    def trained(self) -> int:
        """How many transitions train: all but the last, as corefit's default says."""
        return self.steps - 1


@define(eq=False, kw_only=True)
class Plain:
    """The step in plain PyTorch, with nothing of corefit but its draws.

    decode   clean latents -> media in [0, 1]
    reward   media -> scores [B]
    draws    the randomness of the rollout
    """

    network: plain.Network
    settings: Settings
    sigmas: Tensor
    cond: Mapping[str, Tensor]
    null: Mapping[str, Tensor]
    shape: Sequence[int]
    decode: Callable[[Tensor], Tensor]
    reward: Callable[[Tensor], Tensor]
    draws: Callable[[], Callable[[], Tensor]]

    @staticmethod
    def of(network: plain.Network, settings: Settings, batch: Batch, backbone: Any, key: Sequence[Any]) -> Plain:
        """The plain step of what corefit's loop trains: the same network, prompts, VAE and draws."""
        shape = (len(batch), *batch.shape)
        device = next(iter(batch.cond.tensors.values())).device

        def draws() -> Callable[[], Tensor]:
            rng = Rng(tuple(key), batch.rows)
            return lambda: rng.randn(shape).to(device, non_blocking=True)

        return Plain(
            network=network,
            settings=settings,
            sigmas=backbone.sigmas(settings.steps, batch.shape).to(device),
            cond=batch.cond.tensors,
            null=backbone.null(1).tensors,
            shape=shape,
            decode=backbone.decode,
            reward=lambda media: media.flatten(1).mean(1),
            draws=draws,
        )

    def published(self) -> None:
        """As the published script does it: sample, decode and score, then one backward for each trained transition."""
        s, both = self.settings, plain.joined(self.cond, self.null)
        draw = self.draws()
        taken = plain.sde(self.network, draw(), both, self.sigmas, s.guidance, s.noise, draw)
        with torch.no_grad():
            advantages = self._advantages(self.reward(self.decode(taken.states[-1])))
        for j in range(s.trained):
            x, x_next = taken.states[j], taken.states[j + 1]
            v = self.network.guided(x, self.sigmas[j].expand(len(x)), both, s.guidance)
            mean, std = plain.transition(x, v, self.sigmas[j], self.sigmas[j + 1], s.noise)
            ratio = torch.exp(plain.log_prob(x_next, mean, std) - taken.log_probs[j])
            clipped = ratio.clamp(1 - s.clip, 1 + s.clip)
            loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
            (loss / s.trained).backward()
        self.network.update()

    def floor(self) -> None:
        """The network's calls alone: those of the rollout, and a forward and backward for each trained transition."""
        s, both = self.settings, plain.joined(self.cond, self.null)
        x = torch.randn(tuple(self.shape), device=self.sigmas.device)
        two, unit = torch.cat([x, x]), torch.ones_like(torch.cat([x, x]))
        with torch.no_grad():
            for sigma in self.sigmas[:-1]:
                self.network(two, sigma.expand(len(two)), both)
        for sigma in self.sigmas[: s.trained]:
            self.network(two, sigma.expand(len(two)), both).backward(unit)
        self.network.update()

    def _advantages(self, rewards: Tensor) -> Tensor:
        """(reward - mean of its group) / (std of all + epsilon), [B]."""
        rewards = rewards.double()
        rows = rewards.reshape(-1, self.settings.group)
        centered = (rows - rows.mean(1, keepdim=True)).reshape(-1)
        limit = self.settings.advantage_clip
        return (centered / (rewards.std(correction=0) + EPSILON)).float().clamp(-limit, limit)
