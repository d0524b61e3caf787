"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206), as diffusers ships them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from attrs import define, field, validators

from corefit import Condition
from corefit.types import Suggested
from corefit_backbones import encoders, original_names, pictures
from corefit_backbones.backbone import Diffusers
from corefit_backbones.folder import LONGEST, check_size

if TYPE_CHECKING:
    from torch import Tensor


@define(eq=False, slots=False)
class Sd3(Diffusers):
    """SD3 and SD3.5 with latents [B, C, H/8, W/8] and conditions {"prompt_embeds": [B, L, D], "pooled": [B, P]}."""

    pipeline_class: ClassVar[str] = "StableDiffusion3Pipeline"
    suggested: ClassVar[Suggested] = Suggested(
        path="stabilityai/stable-diffusion-3.5-medium",
        size=(1024, 1024),
        guidance=4.5,
        steps=40,
    )
    transformer_class: ClassVar[str] = "SD3Transformer2DModel"
    original_rules = staticmethod(original_names.sd3)
    vae_class: ClassVar[str] = "AutoencoderKL"
    codec = pictures

    max_sequence_length: int = field(default=256, validator=[validators.gt(0), validators.le(LONGEST)])
    """Number of T5 tokens that every prompt is padded or cut to; CLIP's number is that of its tokenizer."""

    @cached_property
    def geometry(self) -> tuple[int, int, int, int]:
        """Latent channels, pixels per latent, latents per patch, and patches at most; all but the first on a side."""
        vae, net = self.checkpoint.config("vae"), self.checkpoint.config("transformer")
        self.check_channels(vae["latent_channels"])
        scale = 2 ** (len(vae["block_out_channels"]) - 1)
        return vae["latent_channels"], scale, net["patch_size"], net["pos_embed_max_size"]

    def check_settings(self) -> None:
        _ = self.geometry, self.schedule
        pictures.check(self.checkpoint)
        encoders.check_length(self.checkpoint)

    def latent_shape(self, size: Sequence[int]) -> tuple[int, ...]:
        """(C, H/8, W/8) for [height, width] in pixels; ConfigError for sizes the transformer would crop or refuse."""
        channels, scale, patch, most = self.geometry
        height, width = check_size(size, scale * patch, scale * patch * most)
        return channels, height // scale, width // scale

    def condition_shapes(self) -> Mapping[str, tuple[int, ...]]:
        net, clip = self.checkpoint.config("transformer"), self.checkpoint.config("tokenizer", "tokenizer_config.json")
        embeds = (clip["model_max_length"] + self.max_sequence_length, net["joint_attention_dim"])
        return {"prompt_embeds": embeds, "pooled": (net["pooled_projection_dim"],)}

    def encode_text(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts as StableDiffusion3Pipeline.encode_prompt does, in the dtype given to `load`.

        As there, tokens beyond CLIP's number and beyond max_sequence_length are cut off; diffusers logs which.
        """
        embeds, _, pooled, _ = self.text().encode_prompt(
            list(prompts),
            None,
            None,
            device=self.text_device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return Condition({"prompt_embeds": embeds, "pooled": pooled}).to(self._device)

    def velocity(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        pooled = cond.tensors["pooled"].to(self._dtype)
        return self.predict(x, sigma, cond, pooled_projections=pooled)

    def num_tokens(self, shape: Sequence[int]) -> int:
        patch = self.geometry[2]
        return (shape[-2] // patch) * (shape[-1] // patch)

    def model_spec(self) -> Mapping[str, str]:
        """The medium model of 3.5 has a second attention in some blocks, the large one more blocks than both others."""
        net = self.checkpoint.config("transformer")
        large, medium = net["num_layers"] > 24, bool(net.get("dual_attention_layers", ()))
        version = "3.5" if large or medium else "3"
        size = "large" if large else "medium"
        return {
            "modelspec.architecture": f"stable-diffusion-v{version}-{size}",
            "modelspec.implementation": "diffusers",
            "ss_base_model_version": f"sd{version}_{size}",
        }
