"""Loops around a transformer of diffusers in plain PyTorch, with nothing of corefit: what its steps are compared with.

Latents are [B, ...], noise levels [B], conditions hold `prompt_embeds` and `pooled`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, frozen
from torch.nn.functional import mse_loss

if TYPE_CHECKING:
    from torch import Tensor

Cond = Mapping[str, "Tensor"]
MAX_NORM = 1.0


@define(eq=False)
class Network:
    """A transformer of SD3, called as diffusers' pipeline calls it, and the optimizer of a plain loop."""

    transformer: Any
    optimizer: torch.optim.Optimizer
    dtype: torch.dtype = torch.float32
    autocast: bool = False

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """The velocity [B, ...] in float32; inputs are in `dtype`, and with `autocast` matrices are in bfloat16."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            return self.transformer(
                hidden_states=x.to(self.dtype),
                timestep=1000 * sigma,
                encoder_hidden_states=cond["prompt_embeds"].to(self.dtype),
                pooled_projections=cond["pooled"].to(self.dtype),
                return_dict=False,
            )[0].float()

    def guided(self, x: Tensor, sigma: Tensor, both: Cond, guidance: float) -> Tensor:
        """Guidance in one call of 2B rows; `both` holds the conditions of the prompts, then the empty one's."""
        v_cond, v_null = self(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return v_null + guidance * (v_cond - v_null)

    def update(self) -> None:
        """Clip the gradient, take the optimizer's step and drop the gradient."""
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def adamw(parameters: Sequence[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """The optimizer that corefit's default is, over parameters that train."""
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=lr, fused=True)


def joined(cond: Cond, null: Cond) -> Cond:
    """The conditions of B prompts and B times the empty one's, [2B, ...]."""
    return {key: torch.cat([t, null[key].expand(len(t), *null[key].shape[1:])]) for key, t in cond.items()}


def wide(s: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ...], as x has axes."""
    return s.reshape(-1, *(1 for _ in x.shape[1:]))


def sft_step(network: Network, x0: Tensor, cond: Cond, shift: float) -> None:
    """Rectified flow: a level from the logit-normal, a forward, the squared error, a backward, the optimizer."""
    noise = torch.randn_like(x0)
    t = torch.randn(len(x0), device=x0.device).sigmoid()
    sigma = shift * t / (1 + (shift - 1) * t)
    s = wide(sigma, x0)
    mse_loss(network((1 - s) * x0 + s * noise, sigma, cond), noise - x0).backward()
    network.update()


@torch.no_grad()
def ode(network: Network, x: Tensor, both: Cond, sigmas: Tensor, guidance: float) -> Tensor:
    """Euler's method from noise x along `sigmas` [steps + 1]: the final latents."""
    for i in range(len(sigmas) - 1):
        v = network.guided(x, sigmas[i].expand(len(x)), both, guidance)
        x = x + (sigmas[i + 1] - sigmas[i]) * v
    return x


def transition(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Mean [B, ...] and standard deviation [] of a step of Flow-SDE; sigma and sigma_next are []."""
    dt = sigma_next - sigma
    sd = noise * torch.sqrt(sigma / (1 - torch.where(sigma > 1 - 1e-4, sigma_next, sigma)))
    pull = sd**2 / (2 * sigma)
    mean = x * (1 + pull * dt) + v * (1 + pull * (1 - sigma)) * dt
    return mean, sd * torch.sqrt(-dt)


def log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The Gaussian's logarithm [B], as a mean over all but the first axis."""
    error = ((x - mean) ** 2).flatten(1).mean(1)
    return -error / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)


@frozen(eq=False)
class Trajectory:
    """States of a rollout, one more than there are log-probabilities [B]."""

    states: Sequence[Tensor]
    log_probs: Sequence[Tensor]


@torch.no_grad()
def sde(
    network: Network, x: Tensor, both: Cond, sigmas: Tensor, guidance: float, noise: float, draw: Callable[[], Tensor]
) -> Trajectory:
    """Flow-SDE from noise x along `sigmas`, as the published pipeline with log-probabilities does it."""
    states, log_probs = [x], list["Tensor"]()
    for i in range(len(sigmas) - 1):
        v = network.guided(x, sigmas[i].expand(len(x)), both, guidance)
        mean, std = transition(x, v, sigmas[i], sigmas[i + 1], noise)
        x = mean + std * draw()
        states.append(x)
        log_probs.append(log_prob(x, mean, std))
    return Trajectory(states, log_probs)


@frozen(kw_only=True)
class Correction:
    """Keys of SOAR: correction points, sampling steps of the rollout's length, guidance, and the schedule's shift."""

    points: int
    steps: int
    guidance: float
    shift: float


def published_soar(network: Network, x0: Tensor, cond: Cond, null: Cond, soar: Correction) -> None:
    """SOAR's step as published: a rollout of 2B rows with a graph that nobody needs, and one backward for everything.

    The name of the rollout lives until the step ends, as there.
    """
    noise = torch.randn_like(x0)
    t = torch.randn(len(x0), device=x0.device).sigmoid()
    s = soar.shift * t / (1 + (soar.shift - 1) * t)
    z = (1 - wide(s, x0)) * x0 + wide(s, x0) * noise
    guided = network.guided(z, s, joined(cond, null), soar.guidance)
    losses = [((network(z, s, cond) - (noise - x0)) ** 2).flatten(1).mean(1).sum()]
    lower = (t - 1 / soar.steps).clamp(min=0)
    low = soar.shift * lower / (1 + (soar.shift - 1) * lower)
    stepped = z + wide(low - s, z) * guided.detach()
    for _ in range(soar.points):
        level = low + torch.rand_like(low) * (1 - low)
        share = wide((level - low) / (1 - low), z)
        state = (1 - share) * stepped + share * noise
        target = (state - x0) / wide(level, z)
        losses.append(((network(state, level, cond) - target) ** 2).flatten(1).mean(1).sum())
    (torch.stack(losses).sum() / (len(x0) * (1 + soar.points))).backward()
    network.update()
    del guided
