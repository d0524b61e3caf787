"""Noise levels as a checkpoint's own FlowMatchEulerDiscreteScheduler places them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from corefit.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

CLASS = "FlowMatchEulerDiscreteScheduler"


def check(config: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """`config` if it is a FlowMatchEulerDiscreteScheduler's; ModelError otherwise."""
    if config.get("_class_name") != CLASS:
        raise ModelError(f"{path}: its scheduler is {config.get('_class_name')}; only {CLASS} is understood")
    return config


def mu(config: Mapping[str, Any], tokens: int) -> float:
    """The logarithm of the shift for an image of `tokens` patches: a line through two configured points."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return low + (high - low) * (tokens - few) / (many - few)


def shift(config: Mapping[str, Any], tokens: int) -> float:
    """The shift of training noise: configured, or following the image's size where shifting is dynamic."""
    if not config.get("use_dynamic_shifting", False):
        return float(config.get("shift", 1.0))
    value = mu(config, tokens)
    return math.exp(value) if config.get("time_shift_type", "exponential") == "exponential" else value


def grid(config: Mapping[str, Any], steps: int, tokens: int) -> Tensor:
    """Inference sigmas [steps + 1], the last 0: what the diffusers pipeline steps through; float32, CPU."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    scheduler.set_timesteps(steps, mu=mu(config, tokens) if config.get("use_dynamic_shifting") else None)
    return scheduler.sigmas
