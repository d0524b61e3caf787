"""What the families call their models for programs that list them: SwarmUI's and kohya's names."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import frozen

from corefit.types import Specified
from corefit_backbones.chroma import Chroma
from corefit_backbones.flux import Flux
from corefit_backbones.sd3 import Sd3
from corefit_backbones.wan import Wan

VAE = {"z_dim": 16}


@frozen
class Configs:
    """A checkpoint of which the configs are known."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    settings: dict[str, Any]

    @property
    def parts(self) -> list[str]:
        return ["transformer", *(["transformer_2"] if self.settings else [])]

    def config(self, part: str) -> dict[str, Any]:
        return self.vae if part == "vae" else self.transformer


@pytest.mark.parametrize(
    ("kind", "transformer", "vae", "settings", "architecture", "version"),
    [
        (Sd3, {"num_layers": 24}, VAE, {}, "stable-diffusion-v3-medium", "sd3_medium"),
        (
            Sd3,
            {"num_layers": 24, "dual_attention_layers": [0, 1]},
            VAE,
            {},
            "stable-diffusion-v3.5-medium",
            "sd3.5_medium",
        ),
        (Sd3, {"num_layers": 38}, VAE, {}, "stable-diffusion-v3.5-large", "sd3.5_large"),
        (Flux, {"guidance_embeds": True}, VAE, {}, "Flux.1-dev", "flux1"),
        (Flux, {"guidance_embeds": False}, VAE, {}, "Flux.1-schnell", "flux1"),
        (Chroma, {}, VAE, {}, "chroma", "chroma"),
        (Wan, {"num_layers": 30}, VAE, {}, "wan-2_1-text2video-1_3b", "wan2.1"),
        (Wan, {"num_layers": 40}, VAE, {}, "wan-2_1-text2video-14b", "wan2.1"),
        (Wan, {"num_layers": 40}, VAE, {"boundary_ratio": 0.875}, "wan-2_2-text2video-14b", "wan2.2"),
        (Wan, {"num_layers": 30}, {"z_dim": 48}, {}, "wan-2_2-ti2v-5b", "wan2.2"),
    ],
)
def test_names(kind, transformer, vae, settings, architecture, version):
    backbone = kind(path="somewhere")
    net = {"in_channels": vae["z_dim"], "patch_size": (1, 2, 2), **transformer}
    backbone.__dict__["checkpoint"] = Configs(net, vae, settings)
    assert isinstance(backbone, Specified)
    found = backbone.model_spec()
    assert (found["modelspec.architecture"], found["ss_base_model_version"]) == (architecture, version)
    assert ("diffusers" in found["modelspec.implementation"]) == (kind is not Wan)
