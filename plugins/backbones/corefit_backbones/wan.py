"""Wan 2.1 and 2.2 text-to-video (arXiv 2503.20314), as diffusers ships them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import define, field, validators

from corefit import Condition
from corefit.errors import ModelError
from corefit_backbones import clips, names, network, schedule
from corefit_backbones.backbone import Diffusers
from corefit_backbones.folder import LONGEST, check_size

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 4096


@define(eq=False, slots=False)
class Wan(Diffusers):
    """Latents [B, 16, 1 + (T-1)/4, H/8, W/8]; conditions {"prompt_embeds": [B, L, D]}, zero behind the prompt.

    Of 2.2's A14B both experts train; each sample goes through the one for its noise level, at one guidance scale.
    """

    pipeline_class: ClassVar[str] = "WanPipeline"
    transformer_class: ClassVar[str] = "WanTransformer3DModel"
    vae_class: ClassVar[str] = "AutoencoderKLWan"
    lora_names = staticmethod(names.wan)

    max_sequence_length: int = field(default=512, validator=[validators.gt(0), validators.le(LONGEST)])
    """UMT5 tokens of a prompt, padded and cut to this number."""
    lora_targets: Sequence[str] = field(init=False, default=network.ATTENTION)

    @cached_property
    def geometry(self) -> tuple[int, int, int, int]:
        """Latent channels, frames a latent, pixels a latent, latents a patch."""
        vae, net = self.checkpoint.config("vae"), self.checkpoint.config("transformer")
        channels = vae["z_dim"]
        if net["in_channels"] != channels:
            raise ModelError(f"{self.path}: VAE of {channels} channels, transformer of {net['in_channels']}")
        return channels, vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8), net["patch_size"][1]

    @cached_property
    def boundary(self) -> float | None:
        """Noise level from which on the first of two experts works; None where there is one."""
        ratio = self.checkpoint.settings.get("boundary_ratio")
        if (ratio is None) == ("transformer_2" in self.checkpoint.parts):
            raise ModelError(
                f"{self.path}: model_index.json must have both boundary_ratio and transformer_2, or neither"
            )
        return ratio

    def check_settings(self) -> None:
        _ = self.geometry, self.schedule, self.boundary

    def joined(self, networks: Sequence[Any]) -> Any:
        if self.boundary is None:
            return super().joined(networks)
        from corefit_backbones.experts import Experts

        return Experts(*networks, boundary=self.boundary)

    def latent_shape(self, size: Sequence[int]) -> tuple[int, ...]:
        """(C, 1 + (T-1)/4, H/8, W/8) of [frames, height, width]; [height, width] is one frame."""
        channels, every, scale, patch = self.geometry
        length = clips.latents(size, every)
        height, width = check_size(size[-2:], scale * patch, LARGEST)
        return channels, length, height // scale, width // scale

    def encoding_key(self) -> Mapping[str, str]:
        mended = f"ftfy {version('ftfy')}" if find_spec("ftfy") else "as written"
        return {**super().encoding_key(), "text_length": str(self.max_sequence_length), "text_mended": mended}

    def condition_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.max_sequence_length, self.checkpoint.config("transformer")["text_dim"])}

    def encode_text(self, prompts: Sequence[str]) -> Condition:
        """What WanPipeline.encode_prompt gives, in the dtype of `load`; ftfy mends prompts where it is installed."""
        embeds, _ = self.text().encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self._device,
        )
        return Condition({"prompt_embeds": embeds})

    def encode(self, media: Tensor) -> Tensor:
        self.latent_shape(media.shape[2:])
        return clips.encode(self.vae(), media)

    def decode(self, x0: Tensor) -> Tensor:
        return clips.decode(self.vae(), x0)

    def velocity(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """v [B, C, t, h, w] in float32; the network runs in the dtype of `load`, its timestep in float32."""
        v = self.transformer(
            hidden_states=x.to(self._dtype),
            timestep=1000 * sigma.float(),
            encoder_hidden_states=cond.tensors["prompt_embeds"].to(self._dtype),
            return_dict=False,
        )[0].float()
        assert v.shape == x.shape, f"latents {tuple(x.shape)} were cropped to {tuple(v.shape)}: see latent_shape"
        return v

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        """The checkpoint's own grid [steps + 1], the last 0; float32, CPU."""
        return schedule.grid(self.schedule, steps, tokens=0)

    def shift(self, shape: Sequence[int]) -> float:
        return schedule.shift(self.schedule, tokens=0)
