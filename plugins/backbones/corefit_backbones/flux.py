"""FLUX.1 dev and schnell (Black Forest Labs), as diffusers ships them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from attrs import define, field, validators

from corefit import Condition
from corefit.errors import ModelError
from corefit.types import Suggested
from corefit_backbones import encoders, original_names
from corefit_backbones.packed import Packed

if TYPE_CHECKING:
    from torch import Tensor


@define(eq=False, slots=False)
class Flux(Packed):
    """FLUX.1 with latents [B, 16, H/8, W/8] and conditions {"prompt_embeds": [B, L, D], "pooled": [B, P]}.

    FLUX.1 dev was distilled with guidance: its network takes the scale as an input, so `guided` is one call. schnell
    has no such input, so `guided` is two calls.
    """

    pipeline_class: ClassVar[str] = "FluxPipeline"
    suggested: ClassVar[Suggested] = Suggested(
        path="black-forest-labs/FLUX.1-dev", size=(1024, 1024), guidance=3.5, steps=28
    )
    transformer_class: ClassVar[str] = "FluxTransformer2DModel"
    original_rules = staticmethod(original_names.flux)

    max_sequence_length: int = field(default=512, validator=[validators.gt(0), validators.le(512)])
    """Number of T5 tokens that every prompt is padded or cut to; schnell was trained with 256."""
    guidance: float = field(default=1.0, validator=validators.ge(0))
    """Guidance scale given to FLUX.1 dev where an objective uses no guidance, or a scale of 1."""

    @property
    def distilled(self) -> bool:
        return bool(self.checkpoint.config("transformer").get("guidance_embeds", False))

    def check_settings(self) -> None:
        super().check_settings()
        encoders.check_length(self.checkpoint)
        if self.guidance != 1 and not self.distilled:
            raise ModelError(f"guidance = {self.guidance}: {self.path} has no guidance embedding; remove the key")

    def condition_shapes(self) -> Mapping[str, tuple[int, ...]]:
        net = self.checkpoint.config("transformer")
        embeds = (self.max_sequence_length, net["joint_attention_dim"])
        return {"prompt_embeds": embeds, "pooled": (net["pooled_projection_dim"],)}

    def encode_text(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts as FluxPipeline.encode_prompt does, in the dtype given to `load`."""
        embeds, pooled, _ = self.text().encode_prompt(
            list(prompts), None, device=self.text_device, max_sequence_length=self.max_sequence_length
        )
        return Condition({"prompt_embeds": embeds, "pooled": pooled}).to(self._device)

    def velocity(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        return self._embedded(x, sigma, cond, self.guidance)

    def guided(self, x: Tensor, sigma: Tensor, cond: Condition, scale: float, v_cond: Tensor | None = None) -> Tensor:
        """One call with `scale` as an input if guidance was distilled; otherwise classifier-free guidance.

        If distilled, v_cond is the result at a scale of 1 or of `guidance`, and is not used at any other.
        """
        if not self.distilled:
            return super().guided(x, sigma, cond, scale, v_cond)
        if v_cond is not None and scale in (1, self.guidance):
            return v_cond
        return self._embedded(x, sigma, cond, self.guidance if scale == 1 else scale)

    def _embedded(self, x: Tensor, sigma: Tensor, cond: Condition, scale: float) -> Tensor:
        """v [B, C, H/8, W/8] in float32, with the guidance scale as an input if the network has one."""
        import torch

        guidance = torch.full((len(x),), scale, device=x.device) if self.distilled else None
        pooled = cond.tensors["pooled"].to(self._dtype)
        return self.predict_packed(x, sigma, cond, guidance=guidance, pooled_projections=pooled)

    def model_spec(self) -> Mapping[str, str]:
        return {
            "modelspec.architecture": "Flux.1-dev" if self.distilled else "Flux.1-schnell",
            "modelspec.implementation": "diffusers",
            "ss_base_model_version": "flux1",
        }
