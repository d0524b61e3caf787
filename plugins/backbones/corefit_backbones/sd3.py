"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206), as diffusers ships them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from attrs import define, field, validators

from corefit import Condition
from corefit.errors import ModelError
from corefit_backbones import network, pictures, schedule
from corefit_backbones.backbone import Diffusers
from corefit_backbones.folder import LONGEST, check_size

if TYPE_CHECKING:
    from torch import Tensor


@define(eq=False, slots=False)
class Sd3(Diffusers):
    """Latents [B, C, H/8, W/8]; conditions {"prompt_embeds": [B, L, D], "pooled": [B, P]}."""

    pipeline_class: ClassVar[str] = "StableDiffusion3Pipeline"
    transformer_class: ClassVar[str] = "SD3Transformer2DModel"
    vae_class: ClassVar[str] = "AutoencoderKL"

    max_sequence_length: int = field(default=256, validator=[validators.gt(0), validators.le(LONGEST)])
    """T5 tokens of a prompt, padded and cut to this number; CLIP's number is its tokenizer's."""
    lora_targets: Sequence[str] = field(init=False, default=network.ATTENTION)

    @cached_property
    def geometry(self) -> tuple[int, int, int, int]:
        """Latent channels, pixels a latent, latents a patch, most patches a side."""
        vae, net = self.checkpoint.config("vae"), self.checkpoint.config("transformer")
        channels = vae["latent_channels"]
        if net["in_channels"] != channels:
            raise ModelError(f"{self.path}: VAE of {channels} channels, transformer of {net['in_channels']}")
        return channels, 2 ** (len(vae["block_out_channels"]) - 1), net["patch_size"], net["pos_embed_max_size"]

    def check_settings(self) -> None:
        _ = self.geometry, self.schedule
        pictures.check(self.checkpoint)
        if "tokenizer" in self.checkpoint.parts:
            _ = self.checkpoint.config("tokenizer", "tokenizer_config.json").get("model_max_length")

    def latent_shape(self, size: Sequence[int]) -> tuple[int, ...]:
        """(C, H/8, W/8) of [height, width]; ConfigError for what the transformer would crop or refuse."""
        channels, scale, patch, most = self.geometry
        height, width = check_size(size, scale * patch, scale * patch * most)
        return channels, height // scale, width // scale

    def encoding_key(self) -> Mapping[str, str]:
        return {**super().encoding_key(), "text_length": str(self.max_sequence_length)}

    def condition_shapes(self) -> Mapping[str, tuple[int, ...]]:
        net, clip = self.checkpoint.config("transformer"), self.checkpoint.config("tokenizer", "tokenizer_config.json")
        embeds = (clip["model_max_length"] + self.max_sequence_length, net["joint_attention_dim"])
        return {"prompt_embeds": embeds, "pooled": (net["pooled_projection_dim"],)}

    def encode_text(self, prompts: Sequence[str]) -> Condition:
        """What StableDiffusion3Pipeline.encode_prompt gives, in the dtype of `load`.

        As there, tokens beyond CLIP's number and max_sequence_length are cut off; diffusers logs which.
        """
        embeds, _, pooled, _ = self.text().encode_prompt(
            list(prompts),
            None,
            None,
            device=self._device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return Condition({"prompt_embeds": embeds, "pooled": pooled})

    def encode(self, media: Tensor) -> Tensor:
        """Media [B, 3, H, W] in [0, 1] -> the mode of the VAE's latents, shifted and scaled, float32."""
        self.latent_shape(media.shape[-2:])
        return pictures.encode(self.vae(), media)

    def decode(self, x0: Tensor) -> Tensor:
        """x0 [B, C, H/8, W/8] -> media [B, 3, H, W] in [0, 1], float32; differentiable in x0."""
        return pictures.decode(self.vae(), x0)

    def velocity(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """v [B, C, H/8, W/8] in float32; the network runs in the dtype of `load`, its timestep in float32."""
        v = self.transformer(
            hidden_states=x.to(self._dtype),
            timestep=1000 * sigma.float(),
            encoder_hidden_states=cond.tensors["prompt_embeds"].to(self._dtype),
            pooled_projections=cond.tensors["pooled"].to(self._dtype),
            return_dict=False,
        )[0].float()
        assert v.shape == x.shape, f"latents {tuple(x.shape)} were cropped to {tuple(v.shape)}: see latent_shape"
        return v

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        """The pipeline's own grid [steps + 1] for latents of `shape`, the last 0; float32, CPU."""
        return schedule.grid(self.schedule, steps, self._patches(shape))

    def shift(self, shape: Sequence[int]) -> float:
        """The scheduler's shift; of SD3.5 with dynamic shifting, the one for `shape`."""
        return schedule.shift(self.schedule, self._patches(shape))

    def _patches(self, shape: Sequence[int]) -> int:
        patch = self.geometry[2]
        return (shape[-2] // patch) * (shape[-1] // patch)
