"""Noise levels of a checkpoint's own scheduler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from corefit.errors import ModelError
from corefit_backbones.folder import LEVELS

if TYPE_CHECKING:
    from torch import Tensor

EULER, UNIPC = "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"


def check(config: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """Return `config` if it describes a scheduler with flow-matching noise levels; ModelError otherwise."""
    name = config.get("_class_name")
    if name == EULER or (name == UNIPC and config.get("use_flow_sigmas")):
        for key in LEVELS & config.keys():  # raises now, and not when images are made, if the value is not a number
            config.get(key)
        for key in ("shift", "flow_shift"):
            if config.get(key, 1) <= 0:
                raise ModelError(f"{path}: the scheduler's {key} is {config[key]}; it must be more than 0")
        return config
    raise ModelError(f"{path}: its scheduler is {name}; {EULER}, and {UNIPC} with use_flow_sigmas, are supported")


def mu(config: Mapping[str, Any], tokens: int) -> float:
    """The logarithm of the shift for an image of `tokens` patches, linear between two configured points (FLUX)."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return low + (high - low) * (tokens - few) / (many - few)


def shift(config: Mapping[str, Any], tokens: int) -> float:
    """The shift of training noise: a configured one, or one for `tokens` patches if shifting is dynamic."""
    if not config.get("use_dynamic_shifting", False):
        return float(config.get("flow_shift" if config.get("_class_name") == UNIPC else "shift", 1.0))
    value = mu(config, tokens)
    return math.exp(value) if config.get("time_shift_type", "exponential") == "exponential" else value


def grid(config: Mapping[str, Any], steps: int, tokens: int, *, linear: bool = False) -> Tensor:
    """The sigmas [steps + 1] that the diffusers pipeline samples with, the last 0; float32, CPU.

    linear  whether the pipeline passes its scheduler the grid 1, 1 - 1/steps, ..., 1/steps, as FLUX's does
    """
    import diffusers
    import numpy as np

    scheduler: Any = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    asked: dict[str, Any] = {"sigmas": np.linspace(1, 1 / steps, steps)} if linear else {"num_inference_steps": steps}
    if config.get("use_dynamic_shifting"):
        asked["mu"] = mu(config, tokens)
    scheduler.set_timesteps(**asked)
    return scheduler.sigmas.float().cpu()
