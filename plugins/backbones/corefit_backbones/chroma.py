"""Chroma (lodestones): a smaller FLUX.1 schnell with classifier-free guidance and a mask over the prompt's padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from attrs import define

from corefit import Condition
from corefit.types import Suggested
from corefit_backbones import original_names
from corefit_backbones.packed import Packed

if TYPE_CHECKING:
    from torch import Tensor


@define(eq=False, slots=False)
class Chroma(Packed):
    """Chroma with latents [B, 16, H/8, W/8] and conditions {"prompt_embeds": [B, L, D], "mask": [B, L]}."""

    pipeline_class: ClassVar[str] = "ChromaPipeline"
    suggested: ClassVar[Suggested] = Suggested(path="lodestones/Chroma1-HD", size=(1024, 1024), guidance=3.0, steps=40)
    transformer_class: ClassVar[str] = "ChromaTransformer2DModel"
    original_rules = staticmethod(original_names.chroma)

    def condition_shapes(self) -> Mapping[str, tuple[int, ...]]:
        width = self.checkpoint.config("transformer")["joint_attention_dim"]
        return {"prompt_embeds": (self.max_sequence_length, width), "mask": (self.max_sequence_length,)}

    def encode_text(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts as ChromaPipeline.encode_prompt does, in the dtype given to `load`."""
        embeds, _, mask, *_ = self.text().encode_prompt(
            list(prompts),
            device=self.text_device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return Condition({"prompt_embeds": embeds, "mask": mask}).to(self._device)

    def velocity(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        import torch

        image = torch.ones(len(x), self.num_tokens(x.shape), device=x.device, dtype=self._dtype)
        mask = torch.cat([cond.tensors["mask"].to(self._dtype), image], dim=1)
        return self.predict_packed(x, sigma, cond, attention_mask=mask)

    def original_lora(self, module: str) -> str:
        """As for FLUX; the network that computes the modulations, which FLUX lacks, has its original names."""
        if not module.startswith(original_names.APPROXIMATOR):
            return super().original_lora(module)
        return f"diffusion_model.{original_names.module_name(module, original_names.chroma(0))}"

    def model_spec(self) -> Mapping[str, str]:
        return {
            "modelspec.architecture": "chroma",
            "modelspec.implementation": "diffusers",
            "ss_base_model_version": "chroma",
        }
