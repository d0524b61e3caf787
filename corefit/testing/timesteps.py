"""Checks that a backbone passes its network the same timestep as diffusers' pipeline does at the same noise level."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corefit.testing.checks import close, expect
from corefit.types import Backbone, Condition

if TYPE_CHECKING:
    from torch import Tensor

STEPS = 3
SAME = 1e-4
"""The tolerance for float32 arithmetic."""
TOLERANCE = 2e-3
"""The tolerance for timesteps, relative to the largest one; some schedulers round them to integers up to 1000."""


def check_timesteps(backbone: Backbone, folder: Path, media: Tensor, prompt: str, x: Tensor, cond: Condition) -> None:
    """Raise AssertionError if the network gets another timestep than in the diffusers pipeline saved in `folder`.

    Nothing is compared if diffusers has no pipeline from text to media for the folder.

    backbone  loaded from the folder
    media     [B, 3, (T,) H, W], whose size the pipeline generates
    x, cond   latents and condition of one row
    """
    import torch

    pipeline = _pipeline(folder)
    timesteps = _pipeline_timesteps(pipeline, list(media.shape[2:]), prompt) if pipeline else []
    network = type(getattr(pipeline, "transformer", None)).__name__
    for sigma, expected in timesteps:
        with _recorded_timesteps(m for m in backbone.transformer.modules() if type(m).__name__ == network) as ours:
            backbone.velocity(x, torch.tensor([sigma]), cond)
        expect(
            len(ours) > 0 and abs(ours[0] - expected) <= TOLERANCE * timesteps[0][1],
            f"at sigma {sigma:.4g} the network gets the timestep {ours[0] if ours else 'none'}, and "
            f"{type(pipeline).__name__} passes it {expected:.4g}: some networks take sigma, others 1000 sigma, and "
            "sigma 1 is pure noise",
        )
        _check_network(backbone, pipeline, network, sigma, x, cond)


def _check_network(backbone: Backbone, pipeline: Any, name: str, sigma: float, x: Tensor, cond: Condition) -> None:
    """Check that networks of class `name` give the same output as the pipeline's network for the same arguments."""
    import torch

    theirs: list[Any] = [pipeline.transformer, getattr(pipeline, "transformer_2", None)]
    ours = [m for m in backbone.transformer.modules() if type(m).__name__ == name]
    calls: list[tuple[Any, Any, Any, Any]] = []
    with ExitStack() as hooks:
        for mine in ours:
            hooks.callback(mine.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True).remove)
        backbone.velocity(x, torch.tensor([sigma]), cond)
    for mine, args, keys, out in calls:
        other = theirs[ours.index(mine)]
        expect(
            close(other(*args, **keys)[0], out[0], SAME),
            f"at sigma {sigma:.4g} the {name} of the backbone gives other values than diffusers' own, which was given "
            "the same arguments: hooks, or what embeds the timestep, change it (network.exact_time is for networks "
            "that take sigma, not 1000 sigma)",
        )


def _pipeline(folder: Path) -> Any:
    """Return the diffusers pipeline of a folder, or None if the folder has none."""
    if not (folder / "model_index.json").exists():
        return None
    from diffusers import DiffusionPipeline

    pipeline: Any = DiffusionPipeline
    loaded = pipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def _pipeline_timesteps(pipeline: Any, size: Sequence[int], prompt: str) -> list[tuple[float, float]]:
    """Return (sigma, timestep) of each step of a pipeline, with the timestep that its network gets."""
    takes = inspect.signature(pipeline.__call__).parameters
    *frames, height, width = size
    arguments = {
        "prompt": prompt,
        "height": height,
        "width": width,
        "num_frames": frames[0] if frames else 1,
        "num_inference_steps": STEPS,
        "guidance_scale": 1.0,
        "output_type": "latent",
    }
    if not {"prompt", "num_inference_steps"} <= takes.keys():
        return []
    networks = [getattr(pipeline, name, None) for name in ("transformer", "transformer_2")]
    with _recorded_timesteps(network for network in networks if network is not None) as recorded:
        pipeline(**{name: value for name, value in arguments.items() if name in takes})
    calls = len(recorded) // STEPS
    sigmas: list[float] = pipeline.scheduler.sigmas.tolist()
    return list(zip(sigmas[:STEPS], recorded[::calls], strict=True))


@contextmanager
def _recorded_timesteps(networks: Any) -> Generator[list[float]]:
    """Record the timestep of each call of the networks inside the block."""
    recorded: list[float] = []

    def record(module: Any, args: tuple[Any, ...], keys: dict[str, Any]) -> None:
        timestep = inspect.signature(module.forward).bind_partial(*args, **keys).arguments.get("timestep")
        if timestep is not None:
            recorded.append(float(timestep.max()))

    with ExitStack() as hooks:
        for network in networks:
            hooks.callback(network.register_forward_pre_hook(record, with_kwargs=True).remove)
        yield recorded
