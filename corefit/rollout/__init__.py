"""Rollouts: the one sampling loop, the samplers that take its steps, and the noise weightings of training."""

from corefit.rollout.loop import Transition, generate, rollout

__all__ = ["Transition", "generate", "rollout"]
