"""Chroma (lodestones): FLUX.1 schnell made smaller, with guidance of two calls and a mask over the prompt's padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import define, field, validators

from corefit import Condition
from corefit_backbones import network, patches, pictures, schedule
from corefit_backbones.backbone import Diffusers
from corefit_backbones.folder import LONGEST, check_size

if TYPE_CHECKING:
    from torch import Tensor


@define(eq=False, slots=False)
class Chroma(Diffusers):
    """Latents [B, 16, H/8, W/8], packed inside; conditions {"prompt_embeds": [B, L, D], "mask": [B, L]}."""

    pipeline_class: ClassVar[str] = "ChromaPipeline"
    transformer_class: ClassVar[str] = "ChromaTransformer2DModel"
    vae_class: ClassVar[str] = "AutoencoderKL"

    max_sequence_length: int = field(default=512, validator=[validators.gt(0), validators.le(LONGEST)])
    """T5 tokens of a prompt, padded and cut to this number."""
    lora_targets: Sequence[str] = field(init=False, default=network.ATTENTION)

    @cached_property
    def geometry(self) -> tuple[int, int]:
        """Latent channels, pixels a latent."""
        return patches.geometry(self.checkpoint)

    def check_settings(self) -> None:
        _ = self.geometry, self.schedule

    def joined(self, networks: Sequence[Any]) -> Any:
        return network.exact_time(super().joined(networks))

    def latent_shape(self, size: Sequence[int]) -> tuple[int, ...]:
        """(C, H/8, W/8) of [height, width]; ConfigError for what cannot be packed."""
        channels, scale = self.geometry
        height, width = check_size(size, scale * 2, patches.LARGEST)
        return channels, height // scale, width // scale

    def encoding_key(self) -> Mapping[str, str]:
        return {**super().encoding_key(), "text_length": str(self.max_sequence_length)}

    def condition_shapes(self) -> Mapping[str, tuple[int, ...]]:
        width = self.checkpoint.config("transformer")["joint_attention_dim"]
        return {"prompt_embeds": (self.max_sequence_length, width), "mask": (self.max_sequence_length,)}

    def encode_text(self, prompts: Sequence[str]) -> Condition:
        """What ChromaPipeline.encode_prompt gives, in the dtype of `load`."""
        embeds, _, mask, *_ = self.text().encode_prompt(
            list(prompts),
            device=self._device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return Condition({"prompt_embeds": embeds, "mask": mask})

    def encode(self, media: Tensor) -> Tensor:
        self.latent_shape(media.shape[-2:])
        return pictures.encode(self.vae(), media)

    def decode(self, x0: Tensor) -> Tensor:
        return pictures.decode(self.vae(), x0)

    def velocity(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """v [B, C, H/8, W/8] in float32; sigma itself is the timestep."""
        import torch

        tokens, embeds = patches.pack(x).to(self._dtype), cond.tensors["prompt_embeds"].to(self._dtype)
        seen = torch.ones(tokens.shape[:2], device=x.device, dtype=self._dtype)
        v = self.transformer(
            hidden_states=tokens,
            timestep=sigma.float(),
            encoder_hidden_states=embeds,
            attention_mask=torch.cat([cond.tensors["mask"].to(self._dtype), seen], dim=1),
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x.device),
            img_ids=patches.positions(x),
            return_dict=False,
        )[0]
        return patches.unpack(v.float(), x.shape[-2:])

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        """The pipeline's own grid [steps + 1] for latents of `shape`, the last 0; float32, CPU."""
        return schedule.grid(self.schedule, steps, patches.number(shape), linear=True)

    def shift(self, shape: Sequence[int]) -> float:
        return schedule.shift(self.schedule, patches.number(shape))
