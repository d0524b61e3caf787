"""The timestep convention: at a noise level, a backbone tells its network what diffusers' own pipeline tells it."""

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
"""Of float32 arithmetic."""
TOLERANCE = 2e-3
"""Of the largest timestep: some schedulers round to whole ones of 1000."""


def check_timesteps(backbone: Backbone, folder: Path, media: Tensor, prompt: str, x: Tensor, cond: Condition) -> None:
    """AssertionError where the network is told another timestep than by the pipeline that `folder` holds.

    Not compared where diffusers has no pipeline of text to media for the folder.

    backbone  loaded from the folder
    media     [B, 3, (T,) H, W], of the size that the pipeline is asked for
    x, cond   one row's
    """
    import torch

    pipeline = _pipeline(folder)
    told = _told(pipeline, list(media.shape[2:]), prompt) if pipeline else []
    network = type(getattr(pipeline, "transformer", None)).__name__
    for sigma, expected in told:
        with _noted(m for m in backbone.transformer.modules() if type(m).__name__ == network) as ours:
            backbone.velocity(x, torch.tensor([sigma]), cond)
        expect(
            len(ours) > 0 and abs(ours[0] - expected) <= TOLERANCE * told[0][1],
            f"at sigma {sigma:.4g} the network is told the timestep {ours[0] if ours else 'none'}, and "
            f"{type(pipeline).__name__} tells it {expected:.4g}: some networks take sigma, others 1000 sigma, and "
            "sigma 1 is pure noise",
        )
        _check_network(backbone, pipeline, network, sigma, x, cond)


def _check_network(backbone: Backbone, pipeline: Any, name: str, sigma: float, x: Tensor, cond: Condition) -> None:
    """The networks of class `name` give what the pipeline's give for the same arguments: what embeds time is theirs."""
    import torch

    theirs: list[Any] = [pipeline.transformer, getattr(pipeline, "transformer_2", None)]
    ours = [m for m in backbone.transformer.modules() if type(m).__name__ == name]
    heard: list[tuple[Any, Any, Any, Any]] = []
    with ExitStack() as hooks:
        for mine in ours:
            hooks.callback(mine.register_forward_hook(lambda *call: heard.append(call), with_kwargs=True).remove)
        backbone.velocity(x, torch.tensor([sigma]), cond)
    for mine, args, keys, out in heard:
        other = theirs[ours.index(mine)]
        expect(
            close(other(*args, **keys)[0], out[0], SAME),
            f"at sigma {sigma:.4g} the {name} of the backbone gives other values than diffusers' own, which was given "
            "the same arguments: hooks, or what embeds the timestep, change it (network.exact_time is for networks "
            "that are told sigma, not 1000 sigma)",
        )


def _pipeline(folder: Path) -> Any:
    """diffusers' pipeline of a folder, or None."""
    if not (folder / "model_index.json").exists():
        return None
    from diffusers import DiffusionPipeline

    pipeline: Any = DiffusionPipeline
    made = pipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def _told(pipeline: Any, size: Sequence[int], prompt: str) -> list[tuple[float, float]]:
    """(sigma, timestep) of each step of a pipeline, as its network is told."""
    takes = inspect.signature(pipeline.__call__).parameters
    *frames, height, width = size
    asked = {
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
    with _noted(network for network in networks if network is not None) as noted:
        pipeline(**{name: value for name, value in asked.items() if name in takes})
    calls = len(noted) // STEPS
    sigmas: list[float] = pipeline.scheduler.sigmas.tolist()
    return list(zip(sigmas[:STEPS], noted[::calls], strict=True))


@contextmanager
def _noted(networks: Any) -> Generator[list[float]]:
    """The timestep of each call of the networks."""
    noted: list[float] = []

    def note(module: Any, args: tuple[Any, ...], keys: dict[str, Any]) -> None:
        timestep = inspect.signature(module.forward).bind_partial(*args, **keys).arguments.get("timestep")
        if timestep is not None:
            noted.append(float(timestep.max()))

    with ExitStack() as hooks:
        for network in networks:
            hooks.callback(network.register_forward_pre_hook(note, with_kwargs=True).remove)
        yield noted
