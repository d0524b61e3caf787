"""Rollouts: the one sampling loop, how a step of it is taken, and at which noise levels a model is trained."""

from corefit.rollout.loop import Transition, generate, rollout

__all__ = ["Transition", "generate", "rollout"]
