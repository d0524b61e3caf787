"""Names of a network's tensors in the original code of its family, which ComfyUI and other programs read.

ComfyUI's "Load Diffusion Model" takes a file with these names. Query, key and value are one tensor there for SD3 and
FLUX, and the last modulation has shift before scale where diffusers has scale before shift.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from corefit.errors import ModelError
from corefit.types import OriginalTensor

Rules = Mapping[str, str]
"""Maps a module or a tensor of the original code to what diffusers has in its place.

`#` stands for the number of a block. Several names stand for modules whose rows follow each other in one, and `~` for
rows whose halves change places.
"""


def _mlp(original: str, diffusers: str, names: tuple[str, str]) -> dict[str, str]:
    """Two linear layers, which diffusers calls linear_1 and linear_2."""
    return {f"{original}.{name}": f"{diffusers}.linear_{n}" for n, name in enumerate(names, 1)}


def _joined(prefix: str, names: str) -> str:
    """ "a.to_q a.to_k a.to_v" for the prefix "a." and the names "to_q to_k to_v"."""
    return " ".join(prefix + name for name in names.split())


QKV, ADDED = "to_q to_k to_v", "add_q_proj add_k_proj add_v_proj"
_X, _CONTEXT, _BLOCK = "joint_blocks.#.x_block", "joint_blocks.#.context_block", "transformer_blocks.#"
_MODULATION, _SD3_TEXT = "adaLN_modulation.1", f"{_BLOCK}.norm1_context.linear"

_SD3: Rules = {
    "pos_embed": "pos_embed.pos_embed",
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    **_mlp("t_embedder.mlp", "time_text_embed.timestep_embedder", ("0", "2")),
    **_mlp("y_embedder.mlp", "time_text_embed.text_embedder", ("0", "2")),
    f"{_X}.{_MODULATION}": f"{_BLOCK}.norm1.linear",
    f"{_X}.attn.qkv": _joined(f"{_BLOCK}.attn.", QKV),
    f"{_X}.attn.proj": f"{_BLOCK}.attn.to_out.0",
    f"{_X}.attn.ln_q": f"{_BLOCK}.attn.norm_q",
    f"{_X}.attn.ln_k": f"{_BLOCK}.attn.norm_k",
    f"{_X}.attn2.qkv": _joined(f"{_BLOCK}.attn2.", QKV),
    f"{_X}.attn2.proj": f"{_BLOCK}.attn2.to_out.0",
    f"{_X}.attn2.ln_q": f"{_BLOCK}.attn2.norm_q",
    f"{_X}.attn2.ln_k": f"{_BLOCK}.attn2.norm_k",
    f"{_X}.mlp.fc1": f"{_BLOCK}.ff.net.0.proj",
    f"{_X}.mlp.fc2": f"{_BLOCK}.ff.net.2",
    f"{_CONTEXT}.{_MODULATION}": _SD3_TEXT,
    f"{_CONTEXT}.attn.qkv": _joined(f"{_BLOCK}.attn.", ADDED),
    f"{_CONTEXT}.attn.proj": f"{_BLOCK}.attn.to_add_out",
    f"{_CONTEXT}.attn.ln_q": f"{_BLOCK}.attn.norm_added_q",
    f"{_CONTEXT}.attn.ln_k": f"{_BLOCK}.attn.norm_added_k",
    f"{_CONTEXT}.mlp.fc1": f"{_BLOCK}.ff_context.net.0.proj",
    f"{_CONTEXT}.mlp.fc2": f"{_BLOCK}.ff_context.net.2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "~norm_out.linear",
}


def sd3(layers: int) -> Rules:
    """The rules of SD3 and SD3.5, whose last block only has two modulations of the text, shift and scale."""
    last = layers - 1
    first = {
        f"joint_blocks.{last}.context_block.adaLN_modulation.1": f"~transformer_blocks.{last}.norm1_context.linear"
    }
    return {**first, **_SD3}


_SINGLE = "single_transformer_blocks.#"

_PACKED: Rules = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "double_blocks.#.img_attn.qkv": _joined(f"{_BLOCK}.attn.", QKV),
    "double_blocks.#.txt_attn.qkv": _joined(f"{_BLOCK}.attn.", ADDED),
    "double_blocks.#.img_attn.proj": f"{_BLOCK}.attn.to_out.0",
    "double_blocks.#.txt_attn.proj": f"{_BLOCK}.attn.to_add_out",
    "double_blocks.#.img_attn.norm.query_norm.scale": f"{_BLOCK}.attn.norm_q.weight",
    "double_blocks.#.img_attn.norm.key_norm.scale": f"{_BLOCK}.attn.norm_k.weight",
    "double_blocks.#.txt_attn.norm.query_norm.scale": f"{_BLOCK}.attn.norm_added_q.weight",
    "double_blocks.#.txt_attn.norm.key_norm.scale": f"{_BLOCK}.attn.norm_added_k.weight",
    "double_blocks.#.img_mlp.0": f"{_BLOCK}.ff.net.0.proj",
    "double_blocks.#.img_mlp.2": f"{_BLOCK}.ff.net.2",
    "double_blocks.#.txt_mlp.0": f"{_BLOCK}.ff_context.net.0.proj",
    "double_blocks.#.txt_mlp.2": f"{_BLOCK}.ff_context.net.2",
    "single_blocks.#.linear1": _joined(f"{_SINGLE}.", "attn.to_q attn.to_k attn.to_v proj_mlp"),
    "single_blocks.#.linear2": f"{_SINGLE}.proj_out",
    "single_blocks.#.norm.query_norm.scale": f"{_SINGLE}.attn.norm_q.weight",
    "single_blocks.#.norm.key_norm.scale": f"{_SINGLE}.attn.norm_k.weight",
    "final_layer.linear": "proj_out",
}
"""What FLUX and Chroma share."""
_LAYERS = ("in_layer", "out_layer")


def flux(layers: int) -> Rules:
    """The rules of FLUX.1."""
    return {
        **_PACKED,
        **_mlp("time_in", "time_text_embed.timestep_embedder", _LAYERS),
        **_mlp("vector_in", "time_text_embed.text_embedder", _LAYERS),
        **_mlp("guidance_in", "time_text_embed.guidance_embedder", _LAYERS),
        "double_blocks.#.img_mod.lin": f"{_BLOCK}.norm1.linear",
        "double_blocks.#.txt_mod.lin": f"{_BLOCK}.norm1_context.linear",
        "single_blocks.#.modulation.lin": f"{_SINGLE}.norm.linear",
        "final_layer.adaLN_modulation.1": "~norm_out.linear",
    }


APPROXIMATOR = "distilled_guidance_layer"
"""Chroma's network that computes all modulations; diffusers calls it the same."""


def chroma(layers: int) -> Rules:
    """The rules of Chroma, which computes its modulations in one small network."""
    return {
        **_PACKED,
        f"{APPROXIMATOR}.in_proj": f"{APPROXIMATOR}.in_proj",
        f"{APPROXIMATOR}.out_proj": f"{APPROXIMATOR}.out_proj",
        **_mlp(f"{APPROXIMATOR}.layers.#", f"{APPROXIMATOR}.layers.#", _LAYERS),
        f"{APPROXIMATOR}.norms.#.scale": f"{APPROXIMATOR}.norms.#.weight",
    }


def wan(layers: int) -> Rules:
    """The rules of Wan's text-to-video networks. What diffusers calls norm2 is norm3 there."""
    attention = {
        f"blocks.#.{original}.{theirs}": f"blocks.#.{diffusers}.{ours}"
        for original, diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for theirs, ours in (
            *(("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")),
            *((each, each) for each in ("norm_q", "norm_k")),
        )
    }
    return {
        **attention,
        "patch_embedding": "patch_embedding",
        **_mlp("text_embedding", "condition_embedder.text_embedder", ("0", "2")),
        **_mlp("time_embedding", "condition_embedder.time_embedder", ("0", "2")),
        "time_projection.1": "condition_embedder.time_proj",
        "blocks.#.norm3": "blocks.#.norm2",
        "blocks.#.ffn.0": "blocks.#.ffn.net.0.proj",
        "blocks.#.ffn.2": "blocks.#.ffn.net.2",
        "blocks.#.modulation": "blocks.#.scale_shift_table",
        "head.head": "proj_out",
        "head.modulation": "scale_shift_table",
    }


def arranged(names: Iterable[str], rules: Rules, prefix: str = "") -> dict[str, OriginalTensor]:
    """Say of which tensors of diffusers each original tensor is made; ModelError if one of `names` has no place.

    names   the tensors of one network
    prefix  what stands before them in the names of the parts
    """
    places = [place for original, parts in rules.items() for place in _places(original, parts)]
    found: dict[str, dict[int, str]] = {}
    swapped, complete = set[str](), dict[str, int]()
    for name in names:
        original, n, total, is_swapped = _placed(name, places)
        found.setdefault(original, {})[n] = name
        complete[original] = total
        swapped |= {original} if is_swapped else set()
    for original, parts in found.items():
        if len(parts) != complete[original]:
            raise ModelError(f"{original}: the network has only {', '.join(parts.values())} of its parts")
    return {
        original: OriginalTensor(tuple(prefix + name for _, name in sorted(parts.items())), original in swapped)
        for original, parts in found.items()
    }


_Place = tuple[re.Pattern[str], str, int, int, bool]


def _places(original: str, parts: str) -> list[_Place]:
    """For each part of an original module: its pattern, the original name, which part it is of how many, swapped."""
    named = parts.split()
    patterns = [r"(\d+)".join(map(re.escape, part.removeprefix("~").split("#"))) for part in named]
    return [(re.compile(pattern), original, n, len(named), parts.startswith("~")) for n, pattern in enumerate(patterns)]


def _placed(name: str, places: list[_Place]) -> tuple[str, int, int, bool]:
    """The original name of a tensor, which part of it the tensor is, of how many, and whether halves change places."""
    module, dot, last = name.rpartition(".")
    for pattern, original, n, total, swapped in places:
        for each, suffix in ((name, ""), (module, dot + last)):
            if match := pattern.fullmatch(each):
                return original.replace("#", "".join(match.groups())) + suffix, n, total, swapped
    raise ModelError(f"{name} has no name in the original code of this family, so ComfyUI could not read it")


def module_name(module: str, rules: Rules) -> str:
    """The original name of a module that has one of its own."""
    return next(iter(arranged([f"{module}.weight"], rules))).removesuffix(".weight")
