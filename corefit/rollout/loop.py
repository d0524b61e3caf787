"""The only sampling loop, which evaluation, sample grids and policy rollouts all use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from attrs import frozen

from corefit.flow import expand_like
from corefit.rollout.samplers import Ode
from corefit.types import Backbone, Condition, Sampler, Step
from corefit.types.blame import require_result

if TYPE_CHECKING:
    from torch import Tensor


@frozen(eq=False)
class Transition:
    """A step that was taken from x [B, ...] at sigma [B] to x_next at sigma_next [B]; x_next was drawn from `step`."""

    x: Tensor
    x_next: Tensor
    sigma: Tensor
    sigma_next: Tensor
    step: Step


def rollout(
    backbone: Backbone,
    sampler: Sampler,
    x: Tensor,
    cond: Condition,
    sigmas: Tensor,
    *,
    guidance: float = 1.0,
    randn_like: Callable[[Tensor], Tensor] | None = None,
    stochastic: Tensor | None = None,
) -> Iterator[Transition]:
    """Yield the transitions from x [B, ...] at sigmas[0] to sigmas[-1].

    sigmas      [steps + 1], falling
    randn_like  draws the noise of a transition; needed unless the sampler is deterministic
    stochastic  [steps, B] bool, for SDE windows: a row takes the sampler's step where it is true, and the ODE's step
                where it is false; None means true everywhere
    """
    grid = sigmas.to(x.device, non_blocking=True)
    for i in range(len(grid) - 1):
        sigma, sigma_next = grid[i].expand(len(x)), grid[i + 1].expand(len(x))
        v = backbone.guided(x, sigma, cond, guidance)
        step = sampler.step(x, v, sigma, sigma_next)
        require_result(step, lambda it: isinstance(it, Step), sampler, "step()", "a corefit.Step of mean and std")
        if stochastic is not None:
            step = _select(stochastic[i], step, Ode().step(x, v, sigma, sigma_next))
        x_next = step.mean
        if sampler.stochastic:
            assert randn_like is not None, "a stochastic sampler needs randn_like"
            x_next = x_next + expand_like(step.std, x) * randn_like(x)
        yield Transition(x, x_next, sigma, sigma_next, step)
        x = x_next


def generate(backbone: Backbone, noise: Tensor, cond: Condition, *, steps: int, guidance: float) -> Tensor:
    """Generate clean latents [B, ...] from noise [B, ...] by the ODE on the checkpoint's own grid of sigmas."""
    x = noise
    sigmas = backbone.sigmas(steps, tuple(noise.shape[1:]))
    for transition in rollout(backbone, Ode(), x, cond, sigmas, guidance=guidance):
        x = transition.x_next
    return x


def _select(keep: Tensor, step: Step, other: Step) -> Step:
    """Return the rows of `step` where keep [B] is true, and the rows of `other` elsewhere."""
    return Step(step.mean.where(expand_like(keep, step.mean), other.mean), step.std.where(keep, other.std))
