"""FLUX.1 dev and schnell (Black Forest Labs), as diffusers ships them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import define, field, validators

from corefit import Condition
from corefit.errors import ModelError
from corefit_backbones import network, patches, pictures, schedule
from corefit_backbones.backbone import Diffusers
from corefit_backbones.folder import check_size

if TYPE_CHECKING:
    from torch import Tensor


@define(eq=False, slots=False)
class Flux(Diffusers):
    """Latents [B, 16, H/8, W/8], packed inside; conditions {"prompt_embeds": [B, L, D], "pooled": [B, P]}.

    dev was distilled with guidance: its scale is an input of the network, and guidance is one call. schnell has no
    such input; guidance is then two calls.
    """

    pipeline_class: ClassVar[str] = "FluxPipeline"
    transformer_class: ClassVar[str] = "FluxTransformer2DModel"
    vae_class: ClassVar[str] = "AutoencoderKL"

    max_sequence_length: int = field(default=512, validator=[validators.gt(0), validators.le(512)])
    """T5 tokens of a prompt, padded and cut to this number; schnell was trained with 256."""
    guidance: float = field(default=1.0, validator=validators.ge(0))
    """Scale that FLUX.1 dev is told where none is asked for: in what most objectives train, and at a guidance of 1."""
    lora_targets: Sequence[str] = field(init=False, default=network.ATTENTION)

    @cached_property
    def geometry(self) -> tuple[int, int]:
        """Latent channels, pixels a latent."""
        return patches.geometry(self.checkpoint)

    @property
    def distilled(self) -> bool:
        """Whether guidance is an input of the network."""
        return bool(self.checkpoint.config("transformer").get("guidance_embeds", False))

    def check_settings(self) -> None:
        _ = self.geometry, self.schedule
        pictures.check(self.checkpoint)
        if "tokenizer" in self.checkpoint.parts:
            _ = self.checkpoint.config("tokenizer", "tokenizer_config.json").get("model_max_length")
        if self.guidance != 1 and not self.distilled:
            raise ModelError(f"guidance = {self.guidance}: {self.path} has no guidance embedding; remove the key")

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
        net = self.checkpoint.config("transformer")
        embeds = (self.max_sequence_length, net["joint_attention_dim"])
        return {"prompt_embeds": embeds, "pooled": (net["pooled_projection_dim"],)}

    def encode_text(self, prompts: Sequence[str]) -> Condition:
        """What FluxPipeline.encode_prompt gives, in the dtype of `load`."""
        embeds, pooled, _ = self.text().encode_prompt(
            list(prompts), None, device=self._device, max_sequence_length=self.max_sequence_length
        )
        return Condition({"prompt_embeds": embeds, "pooled": pooled})

    def encode(self, media: Tensor) -> Tensor:
        self.latent_shape(media.shape[-2:])
        return pictures.encode(self.vae(), media)

    def decode(self, x0: Tensor) -> Tensor:
        return pictures.decode(self.vae(), x0)

    def velocity(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        return self._embedded(x, sigma, cond, self.guidance)

    def guided(self, x: Tensor, sigma: Tensor, cond: Condition, scale: float, v_cond: Tensor | None = None) -> Tensor:
        """One call with `scale` embedded where guidance was distilled; v_cond then is of use at `guidance` only."""
        if not self.distilled:
            return super().guided(x, sigma, cond, scale, v_cond)
        if v_cond is not None and scale in (1, self.guidance):
            return v_cond
        return self._embedded(x, sigma, cond, self.guidance if scale == 1 else scale)

    def _embedded(self, x: Tensor, sigma: Tensor, cond: Condition, scale: float) -> Tensor:
        """v [B, C, H/8, W/8] in float32; sigma itself is the timestep, which the network multiplies by 1000."""
        import torch

        embeds = cond.tensors["prompt_embeds"].to(self._dtype)
        v = self.transformer(
            hidden_states=patches.pack(x).to(self._dtype),
            timestep=sigma.float(),
            guidance=torch.full((len(x),), scale, device=x.device) if self.distilled else None,
            pooled_projections=cond.tensors["pooled"].to(self._dtype),
            encoder_hidden_states=embeds,
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
