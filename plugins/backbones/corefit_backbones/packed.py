"""FLUX and the models made from it: their transformers take latents as a sequence of 2 x 2 patches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import define

from corefit import Condition
from corefit_backbones import network, patches, pictures
from corefit_backbones.backbone import Diffusers
from corefit_backbones.folder import check_size

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 8192
"""Pixels on a side at most; the networks themselves have no limit."""


@define(eq=False, slots=False)
class Packed(Diffusers):
    """A family of image models with latents [B, 16, H/8, W/8], packed into patches for the transformer only.

    A family says how it encodes text, and calls `predict_packed` in its `velocity`.
    """

    vae_class: ClassVar[str] = "AutoencoderKL"
    codec = pictures
    timestep_scale: ClassVar[float] = 1
    linear_grid: ClassVar[bool] = True

    @cached_property
    def geometry(self) -> tuple[int, int]:
        """Latent channels, and pixels per latent on a side."""
        vae = self.checkpoint.config("vae")
        self.check_channels(vae["latent_channels"], patch=2)
        return vae["latent_channels"], 2 ** (len(vae["block_out_channels"]) - 1)

    def check_settings(self) -> None:
        _ = self.geometry, self.schedule
        pictures.check(self.checkpoint)

    def joined(self, networks: Sequence[Any]) -> Any:
        return network.exact_time(super().joined(networks))

    def latent_shape(self, size: Sequence[int]) -> tuple[int, ...]:
        """(C, H/8, W/8) for [height, width] in pixels; ConfigError for sizes that cannot be cut into patches."""
        channels, scale = self.geometry
        height, width = check_size(size, scale * 2, LARGEST)
        return channels, height // scale, width // scale

    def num_tokens(self, shape: Sequence[int]) -> int:
        return patches.number(shape)

    def predict_packed(self, x: Tensor, sigma: Tensor, cond: Condition, **inputs: Tensor | None) -> Tensor:
        """What `predict` gives for the patches of x [B, C, H/8, W/8] and their positions, as latents again."""
        import torch

        length = cond.tensors["prompt_embeds"].shape[1]
        text, image = torch.zeros(length, 3, device=x.device), patches.positions(x)
        v = self.predict(patches.pack(x), sigma, cond, txt_ids=text, img_ids=image, **inputs)
        return patches.unpack(v, x.shape[-2:])
