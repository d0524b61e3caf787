"""Wan 2.1 and 2.2 text-to-video (arXiv 2503.20314), as diffusers ships them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import define

from corefit import Condition
from corefit.errors import ModelError
from corefit.types import Suggested
from corefit_backbones import clips, names, original_names
from corefit_backbones.backbone import Diffusers
from corefit_backbones.folder import check_size

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 4096
"""Pixels on a side at most."""


@define(eq=False, slots=False)
class Wan(Diffusers):
    """Wan with latents [B, 16, 1 + (T-1)/4, H/8, W/8] and conditions {"prompt_embeds": [B, L, D]}.

    Embeddings beyond the end of a prompt are 0.

    Both experts of Wan 2.2 A14B are trained. Each sample goes through the expert for its noise level, and the guidance
    scale is the same for both.
    """

    pipeline_class: ClassVar[str] = "WanPipeline"
    suggested: ClassVar[Suggested] = Suggested(
        path="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", size=(81, 480, 832), guidance=5.0, steps=50
    )
    transformer_class: ClassVar[str] = "WanTransformer3DModel"
    original_rules = staticmethod(original_names.wan)
    vae_class: ClassVar[str] = "AutoencoderKLWan"
    codec = clips
    lora_names = staticmethod(names.wan)

    @cached_property
    def geometry(self) -> tuple[int, int, int, int]:
        """Latent channels, frames per latent, pixels per latent, and latents per patch; the last two on a side."""
        vae, net = self.checkpoint.config("vae"), self.checkpoint.config("transformer")
        self.check_channels(vae["z_dim"])
        frames, pixels = vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)
        return vae["z_dim"], frames, pixels, net["patch_size"][1]

    @cached_property
    def boundary(self) -> float | None:
        """Lowest noise level at which the first of two experts is used; None for a model of one network."""
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
        """(C, 1 + (T-1)/4, H/8, W/8) for [frames, height, width] in pixels; [height, width] is one frame."""
        channels, every, scale, patch = self.geometry
        length = clips.latents(size, every)
        height, width = check_size(size[-2:], scale * patch, LARGEST)
        return channels, length, height // scale, width // scale

    def encoding_key(self) -> Mapping[str, str]:
        mended = f"ftfy {version('ftfy')}" if find_spec("ftfy") else "as written"
        return {**super().encoding_key(), "text_mended": mended}

    def condition_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.max_sequence_length, self.checkpoint.config("transformer")["text_dim"])}

    def encode_text(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts as WanPipeline.encode_prompt does, in the dtype given to `load`.

        As there, ftfy corrects the prompts' characters where it is installed.
        """
        embeds, _ = self.text().encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.text_device,
        )
        return Condition({"prompt_embeds": embeds}).to(self._device)

    def velocity(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        return self.predict(x, sigma, cond)

    def num_tokens(self, shape: Sequence[int]) -> int:
        return 0  # WanPipeline's noise levels do not depend on the size

    def original_lora(self, module: str) -> str:
        """The original name after "diffusion_model."; of two experts, each has a file of its own."""
        for name in self.networks:
            module = module.removeprefix(self._prefix(name))
        return f"diffusion_model.{original_names.module_name(module, original_names.wan(0))}"

    def model_spec(self) -> Mapping[str, str]:
        """The sizes have 30 and 40 blocks; two experts, or 48 channels of latents, are of Wan 2.2."""
        net = self.checkpoint.config("transformer")
        kind = f"2_1-text2video-{'14b' if net['num_layers'] >= 40 else '1_3b'}"
        if self.geometry[0] == 48:
            kind = "2_2-ti2v-5b"
        elif self.boundary is not None:
            kind = "2_2-text2video-14b"
        return {
            "modelspec.architecture": f"wan-{kind}",
            "modelspec.implementation": "https://github.com/Wan-Video/Wan2.1",
            "ss_base_model_version": f"wan{kind[:3].replace('_', '.')}",
        }
