"""The names and shapes of exported tensors are those of ComfyUI's modules, and diffusers' converters take them back.

What ComfyUI has was read in Comfy-Org/ComfyUI: comfy/ldm/wan/model.py at 0c9a69ae; in its former place,
comfyanonymous/ComfyUI: comfy/ldm/flux/model.py at 040a3243 and layers.py at 00545103, comfy/ldm/chroma/model.py at
04e411c3 and layers.py at 0323d874, comfy/ldm/modules/diffusionmodules/mmdit.py at 03925bd1. Of SD3.5's second attention
and of LoRA names, comfy/utils.py at 09708eae and comfy/lora.py at 17358c8f. At 0b61ce5b comfy/model_detection.py takes
FLUX's norms both as "scale", as published, and as "weight".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from attrs import frozen

from corefit.errors import ModelError
from corefit.run.publish.export import put_together
from corefit.types import OriginalTensor
from corefit_backbones import original_names
from corefit_backbones.chroma import Chroma
from corefit_backbones.flux import Flux
from corefit_backbones.sd3 import Sd3
from corefit_backbones.wan import Wan

Shapes = dict[str, tuple[int, ...]]


def linear(**layers: tuple[int, ...]) -> Shapes:
    """weight and bias of each layer (out, in, ...); "__" in a name stands for a point."""
    named = {name.replace("__", ".").strip("."): shape for name, shape in layers.items()}
    return {f"{n}.weight": s for n, s in named.items()} | {f"{n}.bias": s[:1] for n, s in named.items()}


def within(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def mmdit(depth: int, positions: int, dual: int = 0) -> Shapes:
    """MMDiT of ComfyUI: heads of 64, as many as blocks; the first `dual` blocks have a second attention."""
    h = 64 * depth
    norm = {"ln_q.weight": (64,), "ln_k.weight": (64,)}
    found: Shapes = {"pos_embed": (1, positions**2, h)}
    found |= linear(x_embedder__proj=(h, 16, 2, 2), context_embedder=(h, 4096))
    found |= linear(t_embedder__mlp__0=(h, 256), t_embedder__mlp__2=(h, h))
    found |= linear(y_embedder__mlp__0=(h, 2048), y_embedder__mlp__2=(h, h))
    found |= linear(final_layer__linear=(64, h), final_layer__adaLN_modulation__1=(2 * h, h))
    for n in range(depth):
        for side in ("x_block", "context_block"):
            own = linear(attn__qkv=(3 * h, h)) | within("attn", norm)
            last = side == "context_block" and n == depth - 1
            second = side == "x_block" and n < dual
            own |= linear(adaLN_modulation__1=((2 if last else 9 if second else 6) * h, h))
            if not last:
                own |= linear(attn__proj=(h, h), mlp__fc1=(4 * h, h), mlp__fc2=(h, 4 * h))
            if second:
                own |= linear(attn2__qkv=(3 * h, h), attn2__proj=(h, h)) | within("attn2", norm)
            found |= within(f"joint_blocks.{n}.{side}", own)
    return found


def flux(guidance: bool, modulated: bool = True) -> Shapes:
    """Flux of ComfyUI, with its 19 and 38 blocks; Chroma has the same without modulations."""
    h, norm = 3072, {"norm.query_norm.scale": (128,), "norm.key_norm.scale": (128,)}
    found = linear(img_in=(h, 64), txt_in=(h, 4096), final_layer__linear=(64, h))
    if modulated:
        found |= linear(final_layer__adaLN_modulation__1=(2 * h, h))
        for name, size in (("time_in", 256), ("vector_in", 768), *([("guidance_in", 256)] if guidance else ())):
            found |= within(name, linear(in_layer=(h, size), out_layer=(h, h)))
    for n in range(19):
        for side in ("img", "txt"):
            own = linear(_attn__qkv=(3 * h, h), _attn__proj=(h, h), _mlp__0=(4 * h, h), _mlp__2=(h, 4 * h))
            own |= linear(_mod__lin=(6 * h, h)) if modulated else {}
            own |= within("_attn", norm)
            found |= {f"double_blocks.{n}.{side}{name}": shape for name, shape in own.items()}
    for n in range(38):
        own = linear(linear1=(7 * h, h), linear2=(h, 5 * h)) | norm
        found |= within(f"single_blocks.{n}", own | (linear(modulation__lin=(3 * h, h)) if modulated else {}))
    return found


def chroma() -> Shapes:
    layer = linear(in_layer=(5120, 5120), out_layer=(5120, 5120))
    approximator = linear(in_proj=(5120, 64), out_proj=(3072, 5120))
    for n in range(5):
        approximator |= within(f"layers.{n}", layer) | {f"norms.{n}.scale": (5120,)}
    return flux(guidance=False, modulated=False) | within("distilled_guidance_layer", approximator)


def wan(layers: int, h: int, ffn: int) -> Shapes:
    """WanModel of ComfyUI, of the type t2v."""
    found = linear(patch_embedding=(h, 16, 1, 2, 2), text_embedding__0=(h, 4096), text_embedding__2=(h, h))
    found |= linear(time_embedding__0=(h, 256), time_embedding__2=(h, h), time_projection__1=(6 * h, h))
    found |= linear(head__head=(64, h)) | {"head.modulation": (1, 2, h)}
    for n in range(layers):
        own = linear(norm3=(h,), ffn__0=(ffn, h), ffn__2=(h, ffn)) | {"modulation": (1, 6, h)}
        for attention in ("self_attn", "cross_attn"):
            own |= within(attention, linear(q=(h, h), k=(h, h), v=(h, h), o=(h, h)))
            own |= {f"{attention}.norm_{each}.weight": (h,) for each in "qk"}
        found |= within(f"blocks.{n}", own)
    return found


@frozen
class Size:
    """A published model: its class and config in diffusers, and what ComfyUI's module has."""

    kind: type[Any]
    config: Mapping[str, Any]
    comfyui: Callable[[], Shapes]

    def network(self) -> torch.nn.Module:
        import diffusers

        with torch.device("meta"):
            return getattr(diffusers, self.kind.transformer_class)(**self.config)

    def arranged(self, network: Any) -> dict[str, OriginalTensor]:
        rules = self.kind.original_rules(network.config["num_layers"])
        return original_names.arranged(network.state_dict(), rules)


JOINT: Mapping[str, Any] = {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "out_channels": 16}
MEDIUM, LARGE = (
    {**JOINT, "in_channels": 16, "num_layers": n, "num_attention_heads": n, "caption_projection_dim": 64 * n}
    for n in (24, 38)
)
SIZES = {
    "sd3-medium": Size(Sd3, {**MEDIUM, "pos_embed_max_size": 192}, lambda: without_norms(mmdit(24, 192))),
    "sd3.5-medium": Size(
        Sd3,
        {**MEDIUM, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
        lambda: mmdit(24, 384, dual=13),
    ),
    "sd3.5-large": Size(Sd3, {**LARGE, "pos_embed_max_size": 192, "qk_norm": "rms_norm"}, lambda: mmdit(38, 192)),
    "flux-dev": Size(Flux, {"guidance_embeds": True}, lambda: flux(guidance=True)),
    "flux-schnell": Size(Flux, {"guidance_embeds": False}, lambda: flux(guidance=False)),
    "chroma": Size(Chroma, {}, chroma),
    "wan-1.3b": Size(
        Wan, {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}, lambda: wan(30, 12 * 128, 8960)
    ),
    "wan-14b": Size(
        Wan, {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}, lambda: wan(40, 40 * 128, 13824)
    ),
}
"""Each expert of Wan 2.2 A14B has the size of Wan 2.1 14B."""


def without_norms(shapes: Shapes) -> Shapes:
    return {name: shape for name, shape in shapes.items() if ".ln_" not in name}


@pytest.mark.parametrize("name", SIZES)
def test_every_tensor_of_the_published_models_has_the_name_and_shape_of_comfyui(name: str) -> None:
    size = SIZES[name]
    network = size.network()
    tensors, arranged = network.state_dict(), size.arranged(network)
    made = {original: tuple(put_together(one, tensors.__getitem__).shape) for original, one in arranged.items()}
    assert made == size.comfyui()
    parts = [part for one in arranged.values() for part in one.parts]
    assert sorted(parts) == sorted(tensors), "each tensor is in one place"


CONVERTERS = {
    "sd3.5-medium": "convert_sd3_transformer_checkpoint_to_diffusers",
    "flux-dev": "convert_flux_transformer_checkpoint_to_diffusers",
    "chroma": "convert_chroma_transformer_checkpoint_to_diffusers",
    "wan-1.3b": "convert_wan_transformer_to_diffusers",
}


@pytest.mark.parametrize("name", CONVERTERS)
def test_diffusers_gives_every_row_its_place_back(name: str) -> None:
    """One column of each tensor of the published size, since the converters only move rows; all numbers differ."""
    from diffusers.loaders import single_file_utils

    network, numbers = SIZES[name].network(), torch.Generator().manual_seed(0)
    columns = {n: torch.rand(t.shape[0], 1, generator=numbers) for n, t in network.state_dict().items()}
    arranged = SIZES[name].arranged(network)
    file = {original: put_together(one, columns.__getitem__) for original, one in arranged.items()}
    if name.startswith("sd3"):
        file["context_embedder.weight"] = file["context_embedder.weight"].expand(-1, 4096)  # its width is read
    back = getattr(single_file_utils, CONVERTERS[name])(file)
    assert back.keys() == columns.keys()
    assert [n for n, column in columns.items() if not torch.equal(back[n][:, :1], column)] == []


def test_a_tensor_that_the_original_code_does_not_have_is_named() -> None:
    with pytest.raises(ModelError, match=r"extra\.weight has no name in the original code"):
        original_names.arranged(["extra.weight"], original_names.flux(1))


def test_half_of_an_original_tensor_is_not_written() -> None:
    names = [f"transformer_blocks.0.attn.to_{which}.weight" for which in "qk"]
    with pytest.raises(ModelError, match=r"img_attn\.qkv\.weight: the network has only .*to_q.*to_k"):
        original_names.arranged(names, original_names.flux(1))


# LoRA

KNOWN = {
    "sd3.5-medium": r"pos_embed\.proj|context_embedder|proj_out|norm_out\.linear|"
    r"time_text_embed\.(timestep|text)_embedder\.linear_[12]|transformer_blocks\.\d+\.("
    r"norm1\.linear|norm1_context\.linear|attn2?\.to_[qkv]|attn\.add_[qkv]_proj|attn2?\.to_out\.0|attn\.to_add_out|"
    r"ff(_context)?\.net\.(0\.proj|2))",
    "flux-dev": r"x_embedder|context_embedder|proj_out|norm_out\.linear|"
    r"time_text_embed\.(timestep|text|guidance)_embedder\.linear_[12]|transformer_blocks\.\d+\.("
    r"norm1\.linear|norm1_context\.linear|attn\.to_[qkv]|attn\.add_[qkv]_proj|attn\.to_out\.0|attn\.to_add_out|"
    r"ff(_context)?\.net\.(0\.proj|2))|single_transformer_blocks\.\d+\.(norm\.linear|proj_mlp|proj_out|attn\.to_[qkv])",
}
"""Modules that ComfyUI knows after "transformer." (mmdit_to_diffusers and flux_to_diffusers in comfy/utils.py)."""
KNOWN["chroma"] = KNOWN["flux-dev"]


@pytest.mark.parametrize("name", ["sd3.5-medium", "flux-dev", "chroma", "wan-1.3b"])
def test_a_lora_on_any_layer_is_found_by_comfyui(name: str) -> None:
    """By a name of diffusers that it knows, or by "diffusion_model." and the name of a module of its own."""
    size = SIZES[name]
    backbone, own = size.kind("some/model"), size.comfyui()
    backbone.checkpoint = Parts()
    layers = [n for n, module in size.network().named_modules() if isinstance(module, torch.nn.Linear)]
    for layer in [n for n in layers if not re.search(r"\.[1-9]\d*\.", n)]:
        prefix, _, rest = backbone.original_lora(layer).partition(".")
        known = re.fullmatch(KNOWN.get(name, ""), rest) if prefix == "transformer" else f"{rest}.weight" in own
        assert known, backbone.original_lora(layer)


class Parts:
    """Stands for the checkpoint of a model of one network."""

    parts = ("transformer",)
